"""Take the screenshots of README and docs from a run of the quickstart.

    python -m egspo_lightning fit --config configs/quickstart.yaml
    python docs/make_screenshots.py logs

Needs Chromium and its driver (apt-get install chromium chromium-driver).
"""

import argparse
import base64
import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from browser import Browser, chromium, missing_browser, tensorboard
from egspo_lightning.analysis.__main__ import write_page
from egspo_lightning.analysis.record_reading import runs_below
from egspo_lightning.errors import UserError

IMAGES = Path(__file__).parent / "images"
SECONDS_TO_DRAW = 3.0
"""TensorBoard draws its charts after the text of the page is complete."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", type=Path, help="the log folder of the quickstart")
    logs = parser.parse_args().logs
    if (missing := missing_browser()) is not None:
        sys.exit(f"error: {missing}")
    try:
        run = runs_below(logs)[-1]
    except UserError as error:
        sys.exit(f"error: {error}")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with chromium(Path(folder) / "page", width=1000, height=640) as browser:
            picture_of_completions(browser, run, Path(folder) / "page.html")
        with tensorboard(logs) as address, chromium(Path(folder) / "board", width=1480, height=920) as browser:
            pictures_of_tensorboard(browser, address)


def picture_of_completions(browser: Browser, run: Path, page: Path) -> None:
    """Save the colored completions, with the pointer on a high-entropy token."""
    write_page(run, page, rollout_batch=None, max_completions=8)
    browser.open(page)
    browser.point_at(browser.find("article:nth-of-type(1) .high"))
    save(browser, "completions")


def pictures_of_tensorboard(browser: Browser, address: str) -> None:
    """Save the charts and the sample completions."""
    for tab, texts in {"custom_scalars": ("reward", "entropy"), "text": ("rollout/samples",)}.items():
        browser.open("about:blank")
        browser.open(f"{address}/#{tab}")
        browser.wait_for(*texts)
        time.sleep(SECONDS_TO_DRAW)
        save(browser, {"custom_scalars": "tensorboard", "text": "samples"}[tab])


def save(browser: Browser, name: str) -> None:
    """Save a PNG with 128 colors, a third of the full size."""
    picture = Image.open(io.BytesIO(base64.b64decode(browser.screenshot()))).convert("RGB")
    path = IMAGES / f"{name}.png"
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(IMAGES.parent.parent)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
