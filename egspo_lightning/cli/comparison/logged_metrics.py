"""Reader of the metrics.csv that Lightning's CSVLogger writes: sums, means and curves over phases."""

import csv
import math
from pathlib import Path

Logged = list[dict[str, str]]
"""One row per logging call; metrics that the call did not log are empty."""


def read(path: Path) -> Logged:
    """All rows, in the order of logging."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def total(logged: Logged, name: str) -> float | None:
    """Sum of a metric over the phases, or None if it was never logged."""
    values = _values(logged, name)
    return math.fsum(values) if values else None


def mean(logged: Logged, name: str) -> float | None:
    """Mean of a metric over the phases, or None if it was never logged."""
    values = _values(logged, name)
    return math.fsum(values) / len(values) if values else None


def curve(logged: Logged, start: int, steps_per_phase: float, name: str) -> list[tuple[float, float]]:
    """Pairs of (phases since the first ``start`` optimizer steps, value) for every value logged after them.

    A row's step is the index of the latest optimizer step, from 0, so ``step + 1`` have been taken.
    """
    points = [(int(row["step"]) + 1 - start, float(row[name])) for row in logged if row.get(name)]
    return [(num_steps / steps_per_phase, value) for num_steps, value in points if num_steps >= 0]


def _values(logged: Logged, name: str) -> list[float]:
    return [float(row[name]) for row in logged if row.get(name)]
