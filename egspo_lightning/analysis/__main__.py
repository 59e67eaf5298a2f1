"""``python -m egspo_lightning.analysis RUN --html out.html``: writes a page of a run's colored completions."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from egspo_lightning.analysis.completion_pages import ColoredCompletions
from egspo_lightning.analysis.record_reading import load
from egspo_lightning.errors import UserError


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a UserError prints one message and exits with code 2."""
    parser = argparse.ArgumentParser(prog="python -m egspo_lightning.analysis", description=__doc__)
    parser.add_argument("run", type=Path, help="log folder, such as logs/lightning_logs/version_0")
    parser.add_argument("--html", type=Path, required=True, metavar="FILE", help="the page to write")
    parser.add_argument("--rollout_batch", type=int, help="number of the only rollout batch to show; by default all")
    parser.add_argument(
        "--max_completions", type=int, default=200, help="limit, the latest first (default: %(default)s)"
    )
    options = parser.parse_args(args)
    try:
        write_page(**vars(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"Page: {options.html}")


def write_page(run: Path, html: Path, *, rollout_batch: int | None, max_completions: int) -> None:
    """Write the page of a run.

    Raises:
        UserError: the run cannot be read, or the file cannot be written
    """
    colored = ColoredCompletions(load(run), rollout_batch=rollout_batch, max_completions=max_completions)
    try:
        html.write_text(colored.page(f"Token entropy of {run}"), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html: {html} cannot be written: {error.strerror}.") from error


if __name__ == "__main__":
    main()
