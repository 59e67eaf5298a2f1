"""Compares methods from the same SFT checkpoints: `python benchmarks/compare_methods.py --help`.

Each seed has one SFT checkpoint, and every method goes on from it with the same number of rollouts and updates. What is
finished is not run again, so the same command resumes. Written into --output: table.md, results.csv, problems.csv.gz,
curves.png, and the runs themselves.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from comparison import report
from comparison.arguments import command, parser, shared_settings, tell_failures, told
from comparison.campaign import Results, carry_out
from comparison.plan import AFTER_SFT, Run, read_learning_rates
from egspo_lightning.errors import UserError


def main() -> int:
    arguments = _arguments()
    shared = shared_settings(arguments)
    baseline = arguments.baseline or arguments.methods[0]
    if baseline not in arguments.methods:
        raise UserError(f"--baseline: {baseline} is not among the --methods {', '.join(arguments.methods)}.")
    if find_spec("matplotlib") is None:
        raise UserError('matplotlib is not installed, which draws the curves. Run: pip install -e ".[bench]"')
    rates = read_learning_rates(arguments.learning_rates, arguments.methods)
    runs = [Run(name, name, seed, rates.get(name)) for seed in arguments.seeds for name in arguments.methods]
    results, failures = carry_out(runs, shared, arguments.jobs)
    if any(run.method is not None for run in results):
        _write(results, arguments.methods, baseline, shared.output)
    tell_failures(failures, shared.output)
    return 1 if failures else 0


def _arguments() -> argparse.Namespace:
    result = parser("Compare methods from the same SFT checkpoints.", seeds=range(1, 9), output="logs/compare")
    result.add_argument("--baseline", help="the method that the others are compared with (the first of --methods)")
    rates = "YAML or JSON file, method to learning rate after the checkpoint (tune_learning_rates.py writes one)"
    result.add_argument("--learning_rates", type=Path, help=rates)
    return result.parse_args()


def _write(results: Results, methods: list[str], baseline: str, output: Path) -> None:
    from comparison import curves  # matplotlib is needed here alone

    table = report.table(report.rows(results, [AFTER_SFT, *methods], baseline), baseline)
    (output / "table.md").write_text(f"{table}\n\n{report.footer(results, command())}\n")
    report.write_results(results, output / "results.csv")
    report.write_problems(results, output / "problems.csv.gz")
    curves.draw(results, methods, output / "curves.png")
    print(f"{table}\n\nWritten: {output}/table.md, results.csv, problems.csv.gz, curves.png")


if __name__ == "__main__":
    sys.exit(told(main))
