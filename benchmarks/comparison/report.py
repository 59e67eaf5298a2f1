"""Results as files: one row a run, one row a problem, and the table of methods."""

import csv
import gzip
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from comparison.campaign import Results
from comparison.plan import AFTER_SFT, Run
from comparison.statistics import NUM_RESAMPLES, Estimate, Scores, mean_interval, paired_difference, share_won
from egspo_lightning.errors import UserError

COLUMNS = (
    *("method", "seed", "accuracy", "after_sft_accuracy", "wall_seconds", "gate_seconds", "learning_rate"),
    *("updates", "collections", "policy/entropy", "gate/weight_mean", "rollout/length_mean"),
    *("checkpoint", "revision", "finished"),
)


def write_results(results: Results, path: Path) -> None:
    """``results.csv``: one row a method and seed."""
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
    """``problems.csv.gz``: one row a method, seed and problem of the held-out benchmark."""
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "seed", "problem", "correct"))
        for run, result in results.items():
            writer.writerows((run.label, run.seed, name, value) for name, value in result["problems"].items())


class Row(NamedTuple):
    """A method in the table."""

    label: str
    num_seeds: int
    accuracy: Estimate
    difference: Estimate | None
    won: float | None
    wall_seconds: float
    gate_share: float | None


def rows(results: Results, labels: Sequence[str], baseline: str) -> list[Row]:
    """The methods in the order of the labels; pairs are the seeds that method and baseline have both finished."""
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
        raise UserError("--output: its runs answered different problems, so that they cannot be paired. Make it anew.")


def _require_same_start(results: Results) -> None:
    for seed in {run.seed for run in results}:
        starts = {result["checkpoint"] for run, result in results.items() if run.seed == seed}
        if len(starts) > 1:
            raise UserError(
                f"--output: the runs of seed {seed} started from different SFT checkpoints, so the code must have "
                f"changed in between. Delete runs/*/seed_{seed}.json there, and run again."
            )


def table(methods: Sequence[Row], baseline: str) -> str:
    """The methods as a Markdown table."""
    head: tuple[str, ...] = (
        *("method", "seeds", "held-out accuracy", "95 % interval", f"minus {baseline}", "95 % interval"),
        *("seeds won", "wall time (median)", "gating, share of wall time"),
    )
    lines = [head, ("---", *("---:",) * (len(head) - 1)), *map(_cells, methods)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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
    """How the figures were made, and what has to be known to read them."""
    methods = {run: result for run, result in results.items() if run.method is not None}
    notes = [
        f"Held-out accuracy on `{next(iter(results.values()))['benchmark']}`, "
        f"{len(next(iter(results.values()))['problems'])} problems, mean over seeds. Intervals: percentile bootstrap "
        f"that resamples seeds and problems, {NUM_RESAMPLES} times; differences are paired by seed and problem. Wall "
        "time is that of the phases, evaluations left out, with other runs beside it. `after_sft` is the checkpoint "
        "that all methods of a seed start from.",
        *_unequal(methods, "updates"),
        *_unequal({run: result for run, result in methods.items() if not run.is_sft}, "collections"),
        f"Command: `{command}`",
        *(f"{name.capitalize()}: {_distinct(results, name)}" for name in ("processor", "versions", "revision")),
        f"Date: {time.strftime('%Y-%m-%d')}",
    ]
    return "\n\n".join(notes)


def _unequal(results: Results, name: str) -> list[str]:
    """A warning where methods were not given the same number of something."""
    counts: dict[str, list[int]] = {}
    for run, result in results.items():
        counts.setdefault(run.label, []).append(result[name])
    if len({number for numbers in counts.values() for number in numbers}) <= 1:
        return []
    shown = [f"{label} {_span(numbers)}" for label, numbers in counts.items()]
    return [f"Not the same number of {name}: {', '.join(shown)}."]


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def _distinct(results: Results, name: str) -> str:
    counts: dict[str, int] = {}
    for result in results.values():
        counts[result["machine"][name]] = counts.get(result["machine"][name], 0) + 1
    return "; ".join(value if len(counts) == 1 else f"{value} ({n} runs)" for value, n in counts.items())
