"""What a run has logged, from Lightning's metrics.csv."""

import csv
import math
from pathlib import Path

Logged = list[dict[str, str]]
"""A row a logging call; what it did not log is empty."""


def read(path: Path) -> Logged:
    """All rows, in the order of logging."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def total(logged: Logged, name: str) -> float | None:
    """The sum of a metric over the phases; None where it was never logged."""
    values = _values(logged, name)
    return math.fsum(values) if values else None


def mean(logged: Logged, name: str) -> float | None:
    """The mean of a metric over the phases; None where it was never logged."""
    values = _values(logged, name)
    return math.fsum(values) / len(values) if values else None


def curve(logged: Logged, start: int, updates_per_phase: float, name: str) -> list[tuple[float, float]]:
    """(phases since step ``start``, value) wherever the metric was measured."""
    points = [(int(row["step"]), float(row[name])) for row in logged if row.get(name)]
    return [((step - start) / updates_per_phase, value) for step, value in points if step >= start]


def _values(logged: Logged, name: str) -> list[float]:
    return [float(row[name]) for row in logged if row.get(name)]
