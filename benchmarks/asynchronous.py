"""What sampling ahead gains (`data.max_staleness`): whole iterations with it and without: `--help`.

While it trains on one collection a run samples the next, in a thread, so it has twice the threads at work. The third
side is the fair one: no sampling ahead, and as many threads for each operation as the second has in all.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from comparison.arguments import told
from measuring.listeners import IterationTimes, PhaseTimes
from measuring.report import add_workloads, parse, parser, publish
from measuring.timing import Reading, in_turn, ratio, seconds, spread
from measuring.workloads import NAMES, Workload, choose, found, train

NAME = "asynchronous"


class Way(NamedTuple):
    """How a side runs."""

    max_staleness: int
    threads: int

    def __str__(self) -> str:
        return f"max_staleness {self.max_staleness}, {self.threads} threads an operation"


class Measured(NamedTuple):
    """An iteration of one run, the median of several; seconds."""

    reading: Reading
    sampling: float
    waiting: float


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(NAME, "Time of an iteration with sampling ahead over that without.", rounds=5)
    flags.add_argument("--iterations", type=int, default=10, help="timed iterations a run (10)")
    flags.add_argument("--flags", nargs="*", default=[], help="further flags of the project's own command line")
    add_workloads(flags, "quickstart")
    flags.set_defaults(threads=1)
    arguments = parse(flags, argv)
    tables = {NAMES[name]: _compare(choose(name, arguments.models), arguments) for name in arguments.workloads}
    publish(NAME, arguments, tables)
    return 0


def _compare(workload: Workload, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    threads = arguments.threads
    ways = [Way(0, threads), Way(1, threads), Way(0, 2 * threads)]
    sides = {str(way): lambda way=way: _measure(workload, way, arguments) for way in ways}
    return _rows(in_turn(sides, arguments.rounds, measure=lambda run: run()))


def _measure(workload: Workload, way: Way, arguments: argparse.Namespace) -> Measured:
    """Without the first iteration, whose rollouts are never sampled ahead, and the last, which samples none."""
    torch.set_num_threads(way.threads)
    listeners = [(IterationTimes, {"warmup": 1}), (PhaseTimes, {})]
    flags = [f"--data.max_staleness={way.max_staleness}", *arguments.flags]
    cli = train(workload, arguments.iterations + 2, listeners, *flags)
    readings = found(cli, IterationTimes).readings[:-1]
    times = found(cli, PhaseTimes).times[1:-1]
    return Measured(
        Reading(*(statistics.median(column) for column in zip(*readings, strict=True))),
        statistics.median(row["time/sample"] + row["time/grade"] for row in times),
        statistics.median(row.get("time/wait", 0.0) for row in times),
    )


def _rows(measured: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    base = [one.reading for one in next(iter(measured.values()))]
    rows = []
    for way, mine in measured.items():
        readings = [one.reading for one in mine]
        rows.append(
            {
                "way": way,
                "rounds": len(mine),
                "seconds": str(seconds(readings)),
                "CPU seconds": str(seconds(readings, "cpu")),
                "over the first": str(ratio(readings, base)),
                "sampling and grading, s": str(spread([one.sampling for one in mine])),
                "waited for it, s": str(spread([one.waiting for one in mine])),
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(told(main))
