"""Result files: one row per run, one row per problem, and the table of methods."""

import csv
import gzip
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from comparison.plan import AFTER_SFT, Results, Run
from comparison.statistics import NUM_RESAMPLES, Estimate, Scores, mean_interval, paired_difference, share_won
from comparison.tables import markdown_table
from egspo_lightning.errors import UserError

COLUMNS = (
    *("method", "seed", "accuracy", "after_sft_accuracy", "wall_seconds", "gate_seconds", "learning_rate"),
    *("optimizer_steps", "rollout_batches", "policy/entropy", "gate/weight_mean", "rollout/length_mean"),
    *("checkpoint", "revision", "finished"),
)


def write_results(results: Results, path: Path) -> None:
    """Write ``results.csv``: one row per method and seed."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(_row(run, result, results) for run, result in results.items())


def _row(run: Run, result: dict[str, Any], results: Results) -> dict[str, Any]:
    start = results.get(Run(AFTER_SFT, None, run.seed), {})
    values = result | result.get("means", {}) | {"revision": result["machine"]["revision"]}
    values |= {"method": run.label, "seed": run.seed, "after_sft_accuracy": start.get("accuracy")}
    return {column: values.get(column) for column in COLUMNS}


def write_problems(results: Results, path: Path) -> None:
    """Write ``problems.csv.gz``: one row per method, seed and problem of the held-out benchmark."""
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "seed", "problem", "correct"))
        for run, result in results.items():
            writer.writerows((run.label, run.seed, name, value) for name, value in result["problems"].items())


class Row(NamedTuple):
    """One method of the table."""

    label: str
    num_seeds: int
    accuracy: Estimate
    difference: Estimate | None
    won: float | None
    wall_seconds: float
    gate_share: float | None


def rows(results: Results, labels: Sequence[str], baseline: str) -> list[Row]:
    """Compute the rows in the order of ``labels``; pairs are seeds that both method and baseline have finished."""
    by_label = {label: {run.seed: r for run, r in results.items() if run.label == label} for label in labels}
    _require_same_problems(results)
    _require_same_start(results)
    return [_method(label, by_label[label], by_label[baseline]) for label in labels if by_label[label]]


def _method(label: str, mine: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]]) -> Row:
    pairs = [seed for seed in mine if seed in theirs] if mine is not theirs else []
    one, other = _scores(mine, pairs), _scores(theirs, pairs)
    wall = [result["wall_seconds"] for result in mine.values()]
    gates = [result.get("gate_seconds") for result in mine.values()]
    return Row(
        label,
        len(mine),
        mean_interval(_scores(mine, list(mine))),
        paired_difference(one, other) if pairs else None,
        share_won(one, other) if pairs else None,
        statistics.median(wall),
        None if None in gates else sum(filter(None, gates)) / sum(wall),
    )


def _scores(results: dict[int, dict[str, Any]], seeds: Sequence[int]) -> Scores:
    """(S, P)"""
    return np.array([list(results[seed]["problems"].values()) for seed in seeds], dtype=np.float64)


def _require_same_problems(results: Results) -> None:
    if len({tuple(result["problems"]) for result in results.values()}) > 1:
        raise UserError("--output: its runs answered different problems and cannot be paired. Delete it and run again.")


def _require_same_start(results: Results) -> None:
    for seed in {run.seed for run in results}:
        starts = {result["checkpoint"] for run, result in results.items() if run.seed == seed}
        if len(starts) > 1:
            raise UserError(
                f"--output: the runs of seed {seed} started from different SFT checkpoints; the code has probably "
                f"changed in between. Delete runs/*/seed_{seed}.json there, and run again."
            )


def table(methods: Sequence[Row], baseline: str) -> str:
    """Format the methods as a Markdown table."""
    header: tuple[str, ...] = (
        *("method", "seeds", "held-out accuracy", "95 % interval", f"minus {baseline}", "95 % interval"),
        *("seeds won", "wall time (median)", "gating, share of wall time"),
    )
    return markdown_table(header, map(_cells, methods))


def _cells(row: Row) -> tuple[str, ...]:
    gap = row.difference
    return (
        row.label,
        str(row.num_seeds),
        f"{row.accuracy.mean:.3f}",
        f"{row.accuracy.low:.3f} to {row.accuracy.high:.3f}",
        "–" if gap is None else f"{gap.mean:+.3f}",
        "–" if gap is None else f"{gap.low:+.3f} to {gap.high:+.3f}",
        "–" if row.won is None else f"{100 * row.won:.0f} %",
        f"{row.wall_seconds:.0f} s",
        "–" if row.gate_share is None else f"{100 * row.gate_share:.2g} %",
    )


def footer(results: Results, command: str) -> str:
    """Definitions and provenance of the figures."""
    methods = {run: result for run, result in results.items() if run.method is not None}
    notes = [
        f"Held-out accuracy on `{next(iter(results.values()))['benchmark']}`, "
        f"{len(next(iter(results.values()))['problems'])} problems, mean over seeds. Intervals: percentile bootstrap "
        f"that resamples seeds and problems, {NUM_RESAMPLES} times; differences are paired by seed and problem. Wall "
        "time is the time in phases, without evaluations, while other runs share the machine. `after_sft` is the "
        "checkpoint that all methods of a seed start from.",
        *_unequal(methods, "optimizer_steps"),
        *_unequal({run: result for run, result in methods.items() if not run.is_sft}, "rollout_batches"),
        f"Command: `{command}`",
        *(f"{name.capitalize()}: {_distinct(results, name)}" for name in ("processor", "versions", "revision")),
        f"Date: {time.strftime('%Y-%m-%d')}",
    ]
    return "\n\n".join(notes)


def _unequal(results: Results, name: str) -> list[str]:
    """A note if the methods differ in a count."""
    counts: dict[str, list[int]] = {}
    for run, result in results.items():
        counts.setdefault(run.label, []).append(result[name])
    if len({number for numbers in counts.values() for number in numbers}) <= 1:
        return []
    shown = [f"{label} {_span(numbers)}" for label, numbers in counts.items()]
    return [f"Unequal number of {name.replace('_', ' ')}: {', '.join(shown)}."]


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def _distinct(results: Results, name: str) -> str:
    counts: dict[str, int] = {}
    for result in results.values():
        counts[result["machine"][name]] = counts.get(result["machine"][name], 0) + 1
    return "; ".join(value if len(counts) == 1 else f"{value} ({n} runs)" for value, n in counts.items())
