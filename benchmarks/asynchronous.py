"""Time of an iteration with and without asynchronous sampling (`data.max_staleness`); see `--help`.

With `max_staleness 1` a thread samples the next rollout batch while the run trains on the current one, so twice as many
threads work. The third variant is the fair baseline: no sampling ahead, with twice the threads per operation.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from egspo_lightning.cli.comparison.run_callbacks import callback_flag, find_callback
from measuring.callbacks import IterationTimes, PhaseTimes
from measuring.report import add_run_flags, add_workloads, parse, parser, publish
from measuring.script import exit_code
from measuring.timing import Reading, interleave, ratio, seconds, spread
from measuring.workloads import NAMES, Workload, choose, train

NAME = "asynchronous"


class Variant(NamedTuple):
    """Settings of a run."""

    max_staleness: int
    threads: int

    def __str__(self) -> str:
        return f"max_staleness {self.max_staleness}, threads per operation {self.threads}"


class Measured(NamedTuple):
    """Medians over the iterations of a run, in seconds."""

    reading: Reading
    sampling: float
    waiting: float


def main(argv: Sequence[str] | None = None) -> int:
    flags = parser(NAME, "Time of an iteration with and without asynchronous sampling.", rounds=5)
    flags.add_argument("--iterations", type=int, default=10, help="timed iterations per run (10)")
    add_run_flags(flags)
    add_workloads(flags, "quickstart")
    flags.set_defaults(threads=1)
    arguments = parse(flags, argv)
    tables = {NAMES[name]: _compare(choose(name, arguments.models), arguments) for name in arguments.workloads}
    publish(NAME, arguments, tables)
    return 0


def _compare(workload: Workload, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    threads = arguments.threads
    variants = [Variant(0, threads), Variant(1, threads), Variant(0, 2 * threads)]
    runs = {str(variant): partial(_measure, workload, variant, arguments) for variant in variants}
    return _rows(interleave(runs, arguments.rounds, warmup=1))


def _measure(workload: Workload, variant: Variant, arguments: argparse.Namespace) -> Measured:
    """Train, and skip the first iteration, which is never sampled ahead, and the last, which samples nothing ahead."""
    callbacks = callback_flag(IterationTimes, warmup=1), callback_flag(PhaseTimes)
    flags = [f"--num_threads={variant.threads}", f"--data.max_staleness={variant.max_staleness}", *arguments.flags]
    cli = train(workload, arguments.iterations + 2, *callbacks, *flags)
    readings = find_callback(cli, IterationTimes).readings[:-1]
    times = find_callback(cli, PhaseTimes).times[1:-1]
    return Measured(
        Reading(*(statistics.median(column) for column in zip(*readings, strict=True))),
        statistics.median(row["time/sample"] + row["time/grade"] for row in times),
        statistics.median(row.get("time/wait", 0.0) for row in times),
    )


def _rows(measured: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    baseline = [one.reading for one in next(iter(measured.values()))]
    rows = []
    for variant, mine in measured.items():
        readings = [one.reading for one in mine]
        rows.append(
            {
                "variant": variant,
                "rounds": len(mine),
                "seconds": str(seconds(readings)),
                "CPU seconds": str(seconds(readings, "cpu")),
                "time / baseline": str(ratio(readings, baseline)),
                "sampling and grading, s": str(spread([one.sampling for one in mine])),
                "waiting for rollouts, s": str(spread([one.waiting for one in mine])),
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(exit_code(main))
