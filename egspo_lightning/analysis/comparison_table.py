"""Results of ``egspo compare``: the table of methods, one row per run, and one row per problem."""

import csv
import gzip
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from egspo_lightning.analysis.markdown_table import markdown_table
from egspo_lightning.analysis.paired_bootstrap import (
    NUM_RESAMPLES,
    Duels,
    Estimate,
    Scores,
    duels,
    mean_interval,
    paired_difference,
)
from egspo_lightning.errors import UserError

AFTER_SFT = "after_sft"
"""Label of the SFT checkpoints."""
MIN_SEEDS = 5
"""With fewer seeds an interval is too narrow to rely on, and the figure shows each seed instead of a band."""
NUM_SUMMARY_COLUMNS = 7
COLUMNS = (
    *("method", "seed", "accuracy", "after_sft_accuracy", "wall_seconds", "gate_seconds", "learning_rate"),
    *("optimizer_steps", "rollout_batches", "policy/entropy", "gate/weight_mean", "rollout/length_mean"),
    *("checkpoint", "revision", "finished"),
)

Result = Mapping[str, Any]
"""A finished run: ``label``, ``seed``, ``accuracy``, ``problems`` and more, as ``runs/*/*.json`` holds it."""


def write_results(results: Sequence[Result], path: Path) -> None:
    """Write ``results.csv``: one row per method and seed."""
    starts = {result["seed"]: result["accuracy"] for result in results if result["label"] == AFTER_SFT}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for result in results:
            values = {**result, **result.get("means", {}), "revision": result["machine"]["revision"]}
            values |= {"method": result["label"], "after_sft_accuracy": starts.get(result["seed"])}
            writer.writerow(values)


def write_problems(results: Sequence[Result], path: Path) -> None:
    """Write ``problems.csv.gz``: one row per method, seed and problem of the held-out benchmark."""
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "seed", "problem", "correct"))
        for run in results:
            writer.writerows((run["label"], run["seed"], name, value) for name, value in run["problems"].items())


class Row(NamedTuple):
    """One method of the table."""

    label: str
    num_seeds: int
    accuracy: Estimate
    difference: Estimate | None
    """To the baseline, over the seeds that both have finished; None for the baseline itself."""
    duels: Duels | None
    wall_seconds: float
    gate_share: float | None


def table_rows(results: Sequence[Result], labels: Sequence[str], baseline: str) -> list[Row]:
    """Compute the rows in the order of ``labels``; methods without a finished run are left out.

    Raises:
        UserError: runs of the folder cannot be paired.
    """
    by_label = {label: {run["seed"]: run for run in results if run["label"] == label} for label in labels}
    _require_same_problems(results)
    _require_same_start(results)
    return [_method(label, by_label[label], by_label[baseline]) for label in labels if by_label[label]]


def _method(label: str, mine: Mapping[int, Result], theirs: Mapping[int, Result]) -> Row:
    pairs = [seed for seed in mine if seed in theirs] if mine is not theirs else []
    one, other = _scores(mine, pairs), _scores(theirs, pairs)
    wall = [result["wall_seconds"] for result in mine.values()]
    gates = [result.get("gate_seconds") for result in mine.values()]
    return Row(
        label,
        len(mine),
        mean_interval(_scores(mine, list(mine))),
        paired_difference(one, other) if pairs else None,
        duels(one, other) if pairs else None,
        statistics.median(wall),
        None if None in gates else sum(filter(None, gates)) / sum(wall),
    )


def _scores(results: Mapping[int, Result], seeds: Sequence[int]) -> Scores:
    """(S, P)"""
    return np.array([list(results[seed]["problems"].values()) for seed in seeds], dtype=np.float64)


def _require_same_problems(results: Sequence[Result]) -> None:
    if len({tuple(result["problems"]) for result in results}) > 1:
        raise UserError("--output: its runs answered different problems and cannot be paired. Delete it and run again.")


def _require_same_start(results: Sequence[Result]) -> None:
    for seed in {result["seed"] for result in results}:
        if len({result["checkpoint"] for result in results if result["seed"] == seed}) > 1:
            raise UserError(
                f"--output: the runs of seed {seed} started from different SFT checkpoints; the code has probably "
                f"changed in between. Delete runs/*/seed_{seed}.json there, and run again."
            )


def table_cells(rows: Sequence[Row], baseline: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of the table; the first ``NUM_SUMMARY_COLUMNS`` columns are the result."""
    header = (
        *("method", "seeds", "held-out accuracy", "95 % interval", f"minus {baseline}", "95 % interval"),
        *("seeds won", "wall time (median)", "gating, share of wall time"),
    )
    return header, [_cells(row) for row in rows]


def _cells(row: Row) -> tuple[str, ...]:
    gap = row.difference
    return (
        row.label,
        str(row.num_seeds),
        f"{row.accuracy.mean:.3f}",
        f"{row.accuracy.low:.3f} to {row.accuracy.high:.3f}",
        "–" if gap is None else f"{gap.mean:+.3f}",
        "–" if gap is None else f"{gap.low:+.3f} to {gap.high:+.3f}",
        "–" if row.duels is None else _won(row.duels),
        f"{row.wall_seconds:.0f} s",
        "–" if row.gate_share is None else f"{100 * row.gate_share:.2g} %",
    )


def _won(found: Duels) -> str:
    return f"{found.won} of {found.num_seeds}" + (f", {found.tied} tied" if found.tied else "")


def caution(rows: Sequence[Row]) -> str:
    """A sentence on intervals over few seeds; empty where there are enough."""
    least = min(row.num_seeds for row in rows)
    if least >= MIN_SEEDS:
        return ""
    few = (
        "Intervals over one seed cover the problems only"
        if least == 1
        else f"Intervals over {least} seeds are too narrow"
    )
    return f"{few}: give {MIN_SEEDS} or more --seeds before you conclude."


def table_page(results: Sequence[Result], rows: Sequence[Row], baseline: str, command: str) -> str:
    """The page ``table.md``: the table in Markdown, definitions, and provenance of the figures."""
    methods = [result for result in results if result["label"] != AFTER_SFT]
    notes = [
        markdown_table(*table_cells(rows, baseline)),
        f"Held-out accuracy on `{results[0]['benchmark']}`, "
        f"{len(results[0]['problems'])} problems, mean over seeds. Intervals: percentile bootstrap "
        f"that resamples seeds and problems, {NUM_RESAMPLES} times; differences are paired by seed and problem. Wall "
        "time is the time in phases, without evaluations, while other runs share the machine. `after_sft` is the "
        "checkpoint that all methods of a seed start from.",
        *([caution(rows)] if caution(rows) else []),
        *_unequal(methods, "optimizer_steps"),
        *_unequal([result for result in methods if result["rollout_batches"]], "rollout_batches"),
        f"Command: `{command}`",
        *(f"{name.capitalize()}: {_distinct(results, name)}" for name in ("processor", "versions", "revision")),
        f"Date: {time.strftime('%Y-%m-%d')}",
    ]
    return "\n\n".join(notes) + "\n"


def _unequal(results: Sequence[Result], name: str) -> list[str]:
    """A note if the methods differ in a count."""
    counts: dict[str, list[int]] = {}
    for result in results:
        counts.setdefault(result["label"], []).append(result[name])
    if len({number for numbers in counts.values() for number in numbers}) <= 1:
        return []
    shown = [f"{label} {_span(numbers)}" for label, numbers in counts.items()]
    return [f"Unequal number of {name.replace('_', ' ')}: {', '.join(shown)}."]


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def _distinct(results: Sequence[Result], name: str) -> str:
    counts: dict[str, int] = {}
    for result in results:
        counts[result["machine"][name]] = counts.get(result["machine"][name], 0) + 1
    return "; ".join(value if len(counts) == 1 else f"{value} ({n} runs)" for value, n in counts.items())
