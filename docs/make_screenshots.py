"""Take the screenshots of the report in README and docs.

    python docs/make_screenshots.py one_run RUN
    python docs/make_screenshots.py three_runs RUN RUN RUN

Writes images/report_NAME.png, and for a single run images/report_NAME_completions.png. A run is a log folder, or
TITLE=FOLDER. Those in the docs are of the quickstart with math_benchmark.every_n_epochs=10 and the overlays egspo,
grpo and chord_phi. Needs Chromium and its driver (apt-get install chromium chromium-driver).
"""

import argparse
import base64
import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from browser import Browser, chromium, missing_browser
from egspo_lightning.cli.report_command import write_report
from egspo_lightning.errors import UserError

IMAGES = Path(__file__).parent / "images"
WIDTH = 1360
MAX_HEIGHT = 1500
SECONDS_TO_OPEN = 120.0
SECONDS_TO_DRAW = 1.0
"""Chromium paints after the page is ready."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name in the files")
    parser.add_argument("runs", nargs="+", help="log folder, or TITLE=FOLDER")
    given = parser.parse_args()
    if (missing := missing_browser()) is not None:
        sys.exit(f"error: {missing}")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        try:
            write_report([*given.runs, "-o", str(page)], "")
        except UserError as error:
            sys.exit(f"error: {error}")
        with chromium(Path(folder) / "profile", width=WIDTH, height=MAX_HEIGHT) as browser:
            open_page(browser, page)
            picture_of_training(browser, given.name)
            if len(given.runs) == 1:
                picture_of_completions(browser, given.name)


def open_page(browser: Browser, page: Path) -> None:
    """Open the report and wait until it is drawn."""
    deadline = time.monotonic() + SECONDS_TO_OPEN
    browser.open(page)
    while browser.run("return document.body.dataset.ready") != "yes":
        if time.monotonic() > deadline:
            raise TimeoutError(f"{page} is not drawn in {SECONDS_TO_OPEN} s.")
        time.sleep(0.1)
    print(f"Ready after {browser.run('return performance.now()') / 1000:.1f} s at most.")


def picture_of_training(browser: Browser, name: str) -> None:
    """Save the page from its top to the end of the charts."""
    browser.run("document.querySelectorAll('.modebar').forEach(bar => bar.remove())")
    height = browser.run("return document.getElementById('completions').getBoundingClientRect().top + scrollY")
    save(browser, f"report_{name}", height)


def picture_of_completions(browser: Browser, name: str) -> None:
    """Save the top of the completions, with the pointer on a high-entropy token; without records there is none."""
    if browser.run("return document.querySelector('.t.high') === null"):
        return
    browser.point_at(browser.find(".completion:nth-of-type(3) .t.high"))
    browser.run("scrollTo(0, document.querySelector('#completions h2').offsetTop)")
    browser.run("document.querySelector('.completion:nth-of-type(3) .t.high').dispatchEvent("
                "new MouseEvent('mouseover', {bubbles: true}))")  # fmt: skip
    save(browser, f"report_{name}_completions", 760)


def save(browser: Browser, name: str, height: float) -> None:
    """Save the upper part of the window as a PNG with 128 colors, a third of the full size."""
    time.sleep(SECONDS_TO_DRAW)
    picture = Image.open(io.BytesIO(base64.b64decode(browser.screenshot()))).convert("RGB")
    picture = picture.crop((0, 0, picture.width, min(int(height), picture.height)))
    path = IMAGES / f"{name}.png"
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(IMAGES.parent.parent)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
