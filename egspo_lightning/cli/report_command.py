"""``egspo report RUN [RUN ...] -o report.html``: one page that tells the runs. Needs no torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from egspo_lightning.errors import UserError

DEFAULT_FILE = Path("report.html")
EPILOG = (
    "A run is a log folder, such as logs/lightning_logs/version_0. Several runs share the charts, a color each. The "
    "page needs no network and no further files. Completions come from token records, metrics from TensorBoard's "
    "events or CSVLogger's metrics.csv, accuracies from benchmarks.jsonl, settings from config.yaml."
)


def write_report(arguments: Sequence[str], description: str) -> str:
    """Write the page, and return the line to print.

    Raises:
        UserError: a folder is no run, the file cannot be written, or Plotly is missing.
        SystemExit: after help, and for a wrong flag.
    """
    given = _parser(description).parse_args(arguments)
    try:
        from egspo_lightning.analysis.report_page import report_page
        from egspo_lightning.analysis.run_reading import read_runs
    except ImportError as error:
        raise UserError(f"report needs Plotly and pandas: pip install plotly pandas ({error}).") from error
    page = report_page(read_runs(given.runs), given.max_completions)
    try:
        given.output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {given.output} cannot be written: {error.strerror}.") from error
    return f"Report: {given.output}"


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="egspo report", description=description, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="log folder of a run, or NAME=FOLDER")
    parser.add_argument("-o", "--output", type=Path, default=DEFAULT_FILE, help="file to write (default: %(default)s)")
    parser.add_argument(
        "--max_completions",
        type=int,
        default=2000,
        metavar="N",
        help="completions in the page; beyond it they are spread evenly over training (default: %(default)s)",
    )
    return parser
