"""Grader throughput: grades per second with one and with two workers; see README.md, "Grader throughput".

Every measurement starts new workers, so that none profits from earlier parses.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from egspo_lightning.analysis.markdown_table import markdown_table
from egspo_lightning.cli.comparison.provenance import machine
from egspo_lightning.data.answer_formats import boxed_solution
from egspo_lightning.data.reader import read_rows
from egspo_lightning.rewards.fast_path import compare_fast
from egspo_lightning.rewards.grading import MathGrader
from measuring.timing import interleave

PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy", "antlr4-python3-runtime")


class Pair(NamedTuple):
    """A completion and the gold answer."""

    completion: str
    gold: str


@dataclass(frozen=True)
class Measurement:
    """One pass over the pairs. CPU seconds sum this process and the workers; None without /proc."""

    wall_s: float
    cpu_s: float | None
    correct: int


def completions(rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Pair]:
    """Pair each solution with its own answer and with the answer of the next row."""
    texts = [boxed_solution(row["solution"], row["answer"], "auto", where) for where, row in rows]
    golds = [row["answer"] for _, row in rows]
    pairs = zip(texts, golds, golds[1:] + golds[:1], strict=True)
    return [Pair(text, gold) for text, *both in pairs for gold in both]


def undecided(rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Pair]:
    """Pair answers that only math-verify can compare: with answers of other rows, and with themselves over 1."""
    golds = [gold for _, row in rows if not row["answer"].isdigit() and (gold := row["answer"])]
    others = [Pair(answer, gold) for answer, gold in itertools.pairwise(golds)]
    rewritten = [Pair(rf"\frac{{{gold}}}{{1}}", gold) for gold in golds if not set(gold) & set(",=<>$%") - {""}]
    mixed = itertools.chain.from_iterable(itertools.zip_longest(others, rewritten))
    pairs = [pair for pair in mixed if pair is not None and compare_fast(*pair) is None]
    return [Pair(rf"\boxed{{{pair.completion}}}", pair.gold) for pair in dict.fromkeys(pairs)]


def measure(
    pairs: Sequence[Pair], num_workers: int, *, first_core: int = 0, ready: Callable[[], object] = lambda: None
) -> Measurement:
    """Time one pass of a new grader, pinned to one core per worker if the system supports it."""
    with _on_cores(first_core, num_workers), MathGrader(num_workers=num_workers) as grader:
        grader.grade([r"\boxed{x+1}"] * 2 * num_workers, ["1+x"] * 2 * num_workers)  # starts the workers
        texts, golds = [pair.completion for pair in pairs], [pair.gold for pair in pairs]
        ready()
        cpu, started = _cpu_seconds(grader), time.perf_counter()
        grades = grader.grade(texts, golds)
        wall = time.perf_counter() - started
        after = _cpu_seconds(grader)
    assert {grade.status for grade in grades} <= {"graded", "no_answer", "timeout"}
    return Measurement(wall, None if cpu is None or after is None else after - cpu, sum(g.correct for g in grades))


def measure_apart(pairs: Sequence[Pair], num_cores: int) -> Measurement:
    """Time one grader per core at once, each with one worker and all pairs: an upper bound for this machine."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(num_cores), context.SimpleQueue()

    def grade(core: int) -> None:
        results.put(measure(pairs, 1, first_core=core, ready=barrier.wait))

    processes = [context.Process(target=grade, args=(core,)) for core in range(num_cores)]
    for process in processes:
        process.start()
    measurements = [results.get() for _ in processes]
    for process in processes:
        process.join()
    cpu = [m.cpu_s for m in measurements if m.cpu_s is not None]
    wall = max(m.wall_s for m in measurements) / num_cores
    return Measurement(wall, sum(cpu) / num_cores if cpu else None, measurements[0].correct)


def summary(pairs: Sequence[Pair], measurements: Sequence[Measurement]) -> dict[str, Any]:
    rates = [len(pairs) / measurement.wall_s for measurement in measurements]
    cpu = [len(pairs) / measurement.cpu_s for measurement in measurements if measurement.cpu_s]
    return {
        "pairs": len(pairs),
        "correct": measurements[0].correct,
        "grades_per_s": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "grades_per_cpu_s": statistics.median(cpu) if cpu else None,
    }


def table(report: dict[str, dict[str, Any]]) -> str:
    header = ["pairs", "workers", "grades/s", "lowest to highest", "grades/CPU s", "speedup"]
    rows = []
    for kind, variants in report.items():
        baseline = next(iter(variants.values()))["grades_per_s"]
        for workers, found in variants.items():
            cpu = "" if found["grades_per_cpu_s"] is None else f"{found['grades_per_cpu_s']:.0f}"
            rates = f"{found['grades_per_s']:.0f}", f"{found['lowest']:.0f} to {found['highest']:.0f}"
            rows.append([f"{kind} ({found['pairs']})", workers, *rates, cpu, f"{found['grades_per_s'] / baseline:.2f}"])
    return markdown_table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="JSONL with answer and solution")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="numbers of workers to compare")
    parser.add_argument("--repetitions", type=int, default=5, help="measurements per variant (5)")
    parser.add_argument("--limit", type=int, help="maximum number of pairs of each kind")
    parser.add_argument("--output", type=Path, help="JSON file for all measurements")
    options = parser.parse_args(arguments)
    rows = [(where, row) for path in options.data for where, row in read_rows(path) if row.get("solution")]
    report, raw = {}, {}
    for kind, pairs in {"completions": completions(rows), "undecided": undecided(rows)}.items():
        chosen = pairs[: options.limit]
        variants: dict[str, Callable[[], Measurement]] = {str(n): partial(measure, chosen, n) for n in options.workers}
        variants |= {f"{n} apart": partial(measure_apart, chosen, n) for n in options.workers if n > 1}
        raw[kind] = interleave(variants, options.repetitions)
        report[kind] = {name: summary(chosen, measurements) for name, measurements in raw[kind].items()}
    print(table(report))
    if options.output is not None:
        measured = {kind: {name: [vars(m) for m in ms] for name, ms in found.items()} for kind, found in raw.items()}
        versions = {package: version(package) for package in PACKAGES}
        everything = {"machine": machine(), "versions": versions, "summary": report, "measurements": measured}
        options.output.write_text(json.dumps(everything, indent=1) + "\n")


@contextmanager
def _on_cores(first: int, count: int) -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):  # macOS
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[first : first + count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cpu_seconds(grader: MathGrader) -> float | None:
    if not Path("/proc/self/stat").is_file():
        return None
    ticks = 0
    for pid in (os.getpid(), *grader.worker_pids()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
