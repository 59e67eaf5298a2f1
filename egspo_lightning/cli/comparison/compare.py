"""``egspo compare``: trains methods from the same SFT checkpoints, and compares their held-out accuracy.

Each seed has one SFT checkpoint. Every method starts from it and gets the same number of rollout batches and optimizer
steps. Finished runs are kept, so the same command resumes. ``--output`` gets ``table.md``, ``results.csv``,
``problems.csv.gz``, ``curves.png``, and the runs.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from egspo_lightning.analysis.comparison_table import (
    AFTER_SFT,
    NUM_SUMMARY_COLUMNS,
    Result,
    Row,
    caution,
    table_cells,
    table_page,
    table_rows,
    write_problems,
    write_results,
)
from egspo_lightning.cli.comparison.compare_flags import flag_parser, shared_settings
from egspo_lightning.cli.comparison.compared_runs import Run, Settings, method_label, read_learning_rates
from egspo_lightning.cli.comparison.run_scheduler import run_all
from egspo_lightning.cli.comparison.worker_pool import Failure
from egspo_lightning.errors import UserError

DESCRIPTION = (
    "Train several methods from the same SFT checkpoints, and compare their accuracy. Each seed trains SFT once; every "
    "method starts from that checkpoint with the same number of rollout batches. The same command resumes."
)


def main(arguments: Sequence[str]) -> int:
    """Run ``egspo compare``; returns the exit code.

    Raises:
        UserError: a flag, config or method is wrong, or the folder holds another comparison.
    """
    options, flags = _parser().parse_known_args(arguments)
    shared = shared_settings(options, flags)
    labels = [method_label(method) for method in options.methods]
    baseline = _require_comparable(options, labels)
    rates = read_learning_rates(options.learning_rates, labels)
    methods = dict(zip(labels, options.methods, strict=True))
    runs = [Run(name, method, seed, rates.get(name)) for seed in options.seeds for name, method in methods.items()]
    _announce(options, shared)
    try:
        results, failures = run_all(runs, shared, options.jobs)
    except KeyboardInterrupt:
        print("Interrupted. Finished runs are kept, and the same command goes on with the others.", file=sys.stderr)
        return 130
    compared = [run for run in results if run.method is not None]
    if compared:
        command = shlex.join(["egspo", "compare", *arguments])
        _write(list(results.values()), labels, baseline, shared.output, command)
        first = [run for run in compared if run.seed == compared[0].seed]
        folders = shlex.join(str(run.log_folder(shared.output)) for run in first)
        print(f"See: egspo report {folders} -o {shared.output}/report.html")
    report_failures(failures, shared.output)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    result = flag_parser("egspo compare", DESCRIPTION, seeds=range(1, 6), output="logs/compare")
    result.add_argument("--baseline", metavar="METHOD", help="the method of all differences (the first of --methods)")
    rates = "YAML or JSON file of learning rates after SFT, by method"
    result.add_argument("--learning_rates", metavar="FILE", help=rates)
    return result


def _require_comparable(options: argparse.Namespace, labels: Sequence[str]) -> str:
    """The name of the baseline."""
    if len(labels) < 2:
        raise UserError(f"--methods: a comparison needs at least two methods, got {labels[0]} alone. Add another one.")
    baseline = labels[0] if options.baseline is None else method_label(options.baseline)
    if baseline not in labels:
        raise UserError(f"--baseline: {baseline} is not among the --methods {', '.join(labels)}.")
    if find_spec("matplotlib") is None:
        raise UserError("matplotlib draws the curves and is not installed. Run: pip install matplotlib")
    return baseline


def _announce(options: argparse.Namespace, shared: Settings) -> None:
    names, seeds = ", ".join(map(method_label, options.methods)), ", ".join(map(str, options.seeds))
    print(
        f"Methods: {names}. Seeds: {seeds}. Rollout batches after SFT: {shared.phases}. "
        f"Runs at a time: {options.jobs}. Results: {shared.output}",
        file=sys.stderr,
    )


def _write(results: Sequence[Result], labels: Sequence[str], baseline: str, output: Path, command: str) -> None:
    from egspo_lightning.analysis.comparison_curves import learning_curves  # imports matplotlib

    rows = table_rows(results, [AFTER_SFT, *labels], baseline)
    (output / "table.md").write_text(table_page(results, rows, baseline, command), encoding="utf-8")
    write_results(results, output / "results.csv")
    write_problems(results, output / "problems.csv.gz")
    learning_curves(results, labels).savefig(output / "curves.png", dpi=150)
    _print_table(rows, baseline)
    print(f"Written to {output}: table.md, curves.png, results.csv, problems.csv.gz")


def _print_table(rows: Sequence[Row], baseline: str) -> None:
    header, cells = table_cells(rows, baseline)
    table = Table()
    for number, name in enumerate(header[:NUM_SUMMARY_COLUMNS]):
        table.add_column(name, justify="right" if number else "left")
    for row in cells:
        table.add_row(*row[:NUM_SUMMARY_COLUMNS])
    Console(width=None if sys.stdout.isatty() else 120).print(table, *filter(None, [caution(rows)]), markup=False)


def report_failures(failures: dict[Run, Failure], output: Path) -> None:
    """Print one line per failed run, with the path of its log."""
    for run, failure in failures.items():
        log = run.log_file(output)
        where = f" (log: {log})" if log.exists() else ""
        print(f"failed: {run.label}, seed {run.seed}: {failure}{where}", file=sys.stderr)
    if failures:
        print(f"Failed runs: {len(failures)}. The same command tries them again.", file=sys.stderr)
