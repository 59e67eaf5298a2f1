"""Choose a learning rate for each method from one grid: `python benchmarks/tune_learning_rates.py --help`.

Tune on validation problems (benchmarks/validation/*.yaml as a second --config) and on other seeds than the comparison.
Rates chosen on the held-out problems would bias its results. Finished runs are kept, so the same command resumes.
"""

import argparse
import sys
from pathlib import Path

import yaml

from egspo_lightning.analysis.markdown_table import markdown_table
from egspo_lightning.cli.comparison.compare import report_failures
from egspo_lightning.cli.comparison.compare_flags import flag_parser, shared_settings
from egspo_lightning.cli.comparison.compared_runs import Results, Run, method_label, require_distinct
from egspo_lightning.cli.comparison.run_scheduler import run_all
from egspo_lightning.errors import UserError
from measuring.script import command, exit_code

Means = dict[str, dict[float, float]]
"""Mean accuracy over the seeds, by method and learning rate."""


def main() -> int:
    arguments, flags = _parser().parse_known_args()
    shared = shared_settings(arguments, flags)
    require_distinct(arguments.rates, "--rates")
    for rate in arguments.rates:
        if not 0 < rate < float("inf"):
            raise UserError(f"--rates: {rate} must be above 0, such as 1e-4.")
    runs = [
        Run(f"{method_label(name)}@{rate:g}", name, seed, rate)
        for seed in arguments.seeds
        for name in arguments.methods
        for rate in arguments.rates
    ]
    results, failures = run_all(runs, shared, arguments.jobs)
    report_failures(failures, shared.output)
    if failures:
        return 1
    _write(mean_accuracy(results), arguments, shared.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Choose a learning rate for each method from one grid."
    result = flag_parser("tune_learning_rates.py", about, seeds=(101, 102), output="logs/tune")
    grid = [5e-5, 1e-4, 2e-4, 4e-4]
    result.add_argument("--rates", type=float, nargs="+", default=grid, help="grid of all methods")
    return result


def mean_accuracy(results: Results) -> Means:
    """Average the accuracy over the seeds; all runs have finished."""
    scores: dict[str, dict[float, list[float]]] = {}
    for run, result in results.items():
        if run.method is not None and run.learning_rate is not None:
            scores.setdefault(method_label(run.method), {}).setdefault(run.learning_rate, []).append(result["accuracy"])
    return {name: {rate: sum(v) / len(v) for rate, v in by_rate.items()} for name, by_rate in scores.items()}


def best_rate(by_rate: dict[float, float]) -> float:
    """The rate with the highest accuracy; the smallest one in a tie."""
    return min(by_rate, key=lambda rate: (-by_rate[rate], rate))


def _write(means: Means, arguments: argparse.Namespace, output: Path) -> None:
    best = {name: best_rate(by_rate) for name, by_rate in means.items()}
    table = _table(means, best)
    (output / "table.md").write_text(f"{table}\n\nCommand: `{command()}`\n")
    head = f"# Learning rates after the SFT checkpoint, chosen by\n# {command()}\n"
    (output / "learning_rates.yaml").write_text(head + yaml.safe_dump(best, sort_keys=False))
    print(table)
    for name, rate in best.items():
        if len(means[name]) > 1 and rate in (min(means[name]), max(means[name])):
            print(f"{name}: the best rate {rate:g} is at the edge of the grid. Add rates beyond it with --rates.")
    print(f"Written: {output}/learning_rates.yaml, table.md")


def _table(means: Means, best: dict[str, float]) -> str:
    """Accuracy by method and rate, with the best rate of each method in bold."""
    rates = sorted({rate for by_rate in means.values() for rate in by_rate})
    cells = {
        name: [f"**{by_rate[rate]:.3f}**" if rate == best[name] else f"{by_rate[rate]:.3f}" for rate in rates]
        for name, by_rate in means.items()
    }
    return markdown_table(["method", *(f"{rate:g}" for rate in rates)], [[name, *cells[name]] for name in cells])


if __name__ == "__main__":
    sys.exit(exit_code(main))
