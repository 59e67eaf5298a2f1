"""Growth of the time and memory of an iteration with G, completion length and vocabulary; see `--help`.

The model has random weights, so nearly all completions reach the length limit. A "time per unit / base" above 1 means
superlinear growth. Memory is the peak of the run, relative to the memory held before it.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from egspo_lightning.cli.comparison.run_callbacks import callback_flag, find_callback
from measuring.callbacks import IterationTimes
from measuring.memory import peak
from measuring.report import add_models, parse, parser, publish
from measuring.script import exit_code
from measuring.timing import Reading, interleave, seconds, spread
from measuring.workloads import Shape, Workload, random_model, train

NAME = "scaling"


class Point(NamedTuple):
    """A size that grows, and its factor."""

    size: str
    factor: int


class Measured(NamedTuple):
    """Measurements of one run."""

    readings: list[Reading]
    mib: float
    tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(_flags(), argv)
    points = [Point("base", 1), *(Point(size, f) for size in ("G", "length", "vocabulary") for f in arguments.factors)]
    runs = {point: partial(_measure, point, arguments) for point in points}
    publish(NAME, arguments, {"Time and memory of an iteration": _rows(interleave(runs, arguments.rounds))})
    return 0


def _flags() -> argparse.ArgumentParser:
    flags = parser(NAME, "Growth of time and memory with G, length and vocabulary.", rounds=2)
    add_models(flags)
    flags.add_argument("--factors", type=int, nargs="+", default=[2, 4, 8], help="growth factors (2 4 8)")
    flags.add_argument("--iterations", type=int, default=2, help="timed iterations per run (2)")
    flags.add_argument("--problems", type=int, default=4, help="problems per rollout batch (4)")
    flags.add_argument("--length", type=int, default=32, help="completion length of the base, in tokens (32)")
    flags.add_argument("--vocabulary", type=int, default=4096, help="vocabulary of the base (4096)")
    flags.add_argument("--hidden", type=int, default=128, help="hidden size (128)")
    return flags


def _workload(point: Point, arguments: argparse.Namespace) -> Workload:
    factor = {name: point.factor if point.size == name else 1 for name in ("G", "length", "vocabulary")}
    return random_model(
        arguments.models,
        Shape(arguments.hidden, 2, 4, arguments.vocabulary * factor["vocabulary"]),
        num_problems=arguments.problems,
        num_generations=4 * factor["G"],
        max_completion_length=arguments.length * factor["length"],
        num_ppo_epochs=1,
        num_minibatches=1,
    )


def _measure(point: Point, arguments: argparse.Namespace) -> Measured:
    workload, runs = _workload(point, arguments), []
    timer = callback_flag(IterationTimes, warmup=1)
    mib = peak(lambda: runs.append(train(workload, 1 + arguments.iterations, timer)))
    times = find_callback(runs[0], IterationTimes)
    return Measured(times.readings, mib, sum(times.tokens) // len(times.tokens))


def _rows(measured: dict[Point, list[Measured]]) -> list[dict[str, Any]]:
    base = measured[Point("base", 1)]
    rows = []
    for point, mine in measured.items():
        readings = [reading for one in mine for reading in one.readings]
        units = point.factor if point.size == "vocabulary" else mine[0].tokens / base[0].tokens
        pairs = [
            (a.cpu / b.cpu / units, a.wall / b.wall / units)
            for one, other in zip(mine, base, strict=True)
            for a, b in zip(one.readings, other.readings, strict=True)
        ]
        rows.append(
            {
                "size": point.size,
                "factor": point.factor,
                "tokens": mine[0].tokens,
                "seconds": str(seconds(readings)),
                "time per unit / base": str(spread([wall for _, wall in pairs])),
                "CPU time per unit / base": str(spread([cpu for cpu, _ in pairs])),
                "peak MiB": spread([one.mib for one in mine]).median,
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(exit_code(main))
