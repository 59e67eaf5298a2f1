"""How time and memory of an iteration grow with G, completion length and vocabulary: `--help`.

A model with random weights, whose completions are as long as they may be. "per unit over base" above 1 would be growth
faster than linear. Memory is what an iteration needs at most beyond what was held before it.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from comparison.arguments import told
from measuring.listeners import IterationTimes
from measuring.memory import peak
from measuring.report import add_models, parse, parser, publish
from measuring.timing import Reading, seconds, spread
from measuring.workloads import Shape, Workload, found, random_model, train

NAME = "scaling"


class Point(NamedTuple):
    """What grows, and how far."""

    what: str
    factor: int


class Measured(NamedTuple):
    """Of one run."""

    readings: list[Reading]
    mib: float
    tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(_flags(), argv)
    points = [Point("base", 1), *(Point(what, f) for what in ("G", "length", "vocabulary") for f in arguments.factors)]
    measured: dict[Point, list[Measured]] = {point: [] for point in points}
    for number in range(arguments.rounds):
        for point in points if number % 2 == 0 else points[::-1]:
            measured[point].append(_measure(_workload(point, arguments), arguments.iterations))
    publish(NAME, arguments, {"An iteration": _rows(measured)})
    return 0


def _flags() -> argparse.ArgumentParser:
    flags = parser(NAME, "Growth of time and memory with G, length and vocabulary.", rounds=2)
    add_models(flags)
    flags.add_argument("--factors", type=int, nargs="+", default=[2, 4, 8], help="(2 4 8)")
    flags.add_argument("--iterations", type=int, default=2, help="timed iterations a run (2)")
    flags.add_argument("--problems", type=int, default=4, help="problems a collection (4)")
    flags.add_argument("--length", type=int, default=32, help="tokens a completion at the base (32)")
    flags.add_argument("--vocabulary", type=int, default=4096, help="at the base (4096)")
    flags.add_argument("--hidden", type=int, default=128, help="hidden size (128)")
    return flags


def _workload(point: Point, arguments: argparse.Namespace) -> Workload:
    factor = {name: point.factor if point.what == name else 1 for name in ("G", "length", "vocabulary")}
    return random_model(
        arguments.models,
        Shape(arguments.hidden, 2, 4, arguments.vocabulary * factor["vocabulary"]),
        num_problems=arguments.problems,
        num_generations=4 * factor["G"],
        max_completion_length=arguments.length * factor["length"],
        num_ppo_epochs=1,
        num_minibatches=1,
    )


def _measure(workload: Workload, iterations: int) -> Measured:
    runs: list[Any] = []
    mib = peak(lambda: runs.append(train(workload, 1 + iterations, [(IterationTimes, {"warmup": 1})])))
    times: IterationTimes = found(runs[0], IterationTimes)
    return Measured(times.readings, mib, sum(times.tokens) // len(times.tokens))


def _rows(measured: dict[Point, list[Measured]]) -> list[dict[str, Any]]:
    base = measured[Point("base", 1)]
    rows = []
    for point, mine in measured.items():
        readings = [reading for one in mine for reading in one.readings]
        units = point.factor if point.what == "vocabulary" else mine[0].tokens / base[0].tokens
        pairs = [
            (a.cpu / b.cpu / units, a.wall / b.wall / units)
            for one, other in zip(mine, base, strict=True)
            for a, b in zip(one.readings, other.readings, strict=True)
        ]
        rows.append(
            {
                "grows": point.what,
                "factor": point.factor,
                "tokens": mine[0].tokens,
                "seconds": str(seconds(readings)),
                "per unit over base": str(spread([wall for _, wall in pairs])),
                "CPU, per unit over base": str(spread([cpu for cpu, _ in pairs])),
                "peak MiB": spread([one.mib for one in mine]).median,
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(told(main))
