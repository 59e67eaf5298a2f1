"""Rounding of the values that the report's page holds."""

import math
from collections.abc import Iterable


def rounded(values: Iterable[float], digits: int) -> list[float | None]:
    """Values with few significant digits, which keep the page small; None where not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]
