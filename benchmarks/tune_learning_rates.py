"""Finds a learning rate for each method from one grid: `python benchmarks/tune_learning_rates.py --help`.

Give problems of their own (benchmarks/validation/*.yaml as a second --config) and seeds of their own: rates that were
chosen on the held-out problems would flatter them. What is finished is not run again.
"""

import argparse
import sys
from pathlib import Path

import yaml

from comparison.arguments import command, parser, shared_settings, tell_failures, told
from comparison.campaign import Results, carry_out
from comparison.plan import Run, require_distinct
from egspo_lightning.errors import UserError

Means = dict[str, dict[float, float]]
"""Method to rate to accuracy, mean over the seeds."""


def main() -> int:
    arguments = _arguments()
    shared = shared_settings(arguments)
    require_distinct(arguments.rates, "--rates")
    for rate in arguments.rates:
        if not 0 < rate < float("inf"):
            raise UserError(f"--rates: {rate} must be above 0, such as 1e-4.")
    runs = [
        Run(f"{name}@{rate:g}", name, seed, rate)
        for seed in arguments.seeds
        for name in arguments.methods
        for rate in arguments.rates
    ]
    results, failures = carry_out(runs, shared, arguments.jobs)
    tell_failures(failures, shared.output)
    if failures:
        return 1
    _write(mean_accuracy(results), arguments, shared.output)
    return 0


def _arguments() -> argparse.Namespace:
    result = parser("Find a learning rate for each method.", seeds=(101, 102), output="logs/tune")
    grid = [5e-5, 1e-4, 2e-4, 4e-4]
    result.add_argument("--rates", type=float, nargs="+", default=grid, help="the grid, the same for all methods")
    return result.parse_args()


def mean_accuracy(results: Results) -> Means:
    """Over the seeds, all of which are there."""
    scores: dict[str, dict[float, list[float]]] = {}
    for run, result in results.items():
        if run.method is not None and run.learning_rate is not None:
            scores.setdefault(run.method, {}).setdefault(run.learning_rate, []).append(result["accuracy"])
    return {name: {rate: sum(v) / len(v) for rate, v in by_rate.items()} for name, by_rate in scores.items()}


def best_rate(by_rate: dict[float, float]) -> float:
    """The rate of the highest accuracy; of equal ones the smallest."""
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
    """Accuracy by method and rate, the best of a method in bold."""
    rates = sorted({rate for by_rate in means.values() for rate in by_rate})
    lines = [("method", *(f"{rate:g}" for rate in rates)), ("---", *("---:",) * len(rates))]
    for name, by_rate in means.items():
        cells = [f"**{by_rate[r]:.3f}**" if r == best[name] else f"{by_rate[r]:.3f}" for r in rates]
        lines.append((name, *cells))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    sys.exit(told(main))
