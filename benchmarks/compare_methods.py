"""Compare methods from the same SFT checkpoints: `python benchmarks/compare_methods.py --help`.

Each seed has one SFT checkpoint. Every method starts from it and gets the same number of rollout batches and optimizer
steps. Finished runs are kept, so the same command resumes. --output gets table.md, results.csv, problems.csv.gz,
curves.png, and the runs.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from comparison import report
from comparison.arguments import command, exit_code, parser, report_failures, shared_settings
from comparison.plan import AFTER_SFT, Results, Run, read_learning_rates
from comparison.scheduler import run_all
from egspo_lightning.errors import UserError


def main() -> int:
    arguments = _arguments()
    shared = shared_settings(arguments)
    baseline = arguments.baseline or arguments.methods[0]
    if baseline not in arguments.methods:
        raise UserError(f"--baseline: {baseline} is not among the --methods {', '.join(arguments.methods)}.")
    if find_spec("matplotlib") is None:
        raise UserError('matplotlib draws the curves and is not installed. Run: pip install -e ".[bench]"')
    rates = read_learning_rates(arguments.learning_rates, arguments.methods)
    runs = [Run(name, name, seed, rates.get(name)) for seed in arguments.seeds for name in arguments.methods]
    results, failures = run_all(runs, shared, arguments.jobs)
    if any(run.method is not None for run in results):
        _write(results, arguments.methods, baseline, shared.output)
    report_failures(failures, shared.output)
    return 1 if failures else 0


def _arguments() -> argparse.Namespace:
    result = parser("Compare methods from the same SFT checkpoints.", seeds=range(1, 9), output="logs/compare")
    result.add_argument("--baseline", help="baseline of all differences (the first of --methods)")
    rates = "YAML or JSON file of learning rates by method, as tune_learning_rates.py writes it"
    result.add_argument("--learning_rates", type=Path, help=rates)
    return result.parse_args()


def _write(results: Results, methods: list[str], baseline: str, output: Path) -> None:
    from comparison import curves  # imports matplotlib

    table = report.table(report.rows(results, [AFTER_SFT, *methods], baseline), baseline)
    (output / "table.md").write_text(f"{table}\n\n{report.footer(results, command())}\n")
    report.write_results(results, output / "results.csv")
    report.write_problems(results, output / "problems.csv.gz")
    curves.draw(results, methods, output / "curves.png")
    print(f"{table}\n\nWritten: {output}/table.md, results.csv, problems.csv.gz, curves.png")


if __name__ == "__main__":
    sys.exit(exit_code(main))
