"""Timing: stopwatch, interleaved rounds of variants, medians and ratios."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

K = TypeVar("K")


class Reading(NamedTuple):
    """Duration of one measurement."""

    wall: float
    """wall time in seconds"""
    cpu: float
    """CPU time in seconds, over all threads of the process; other processes hardly affect it"""


Clock = Literal["wall", "cpu"]


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


class Stopwatch:
    """Adds up the time between ``start`` and ``stop``."""

    def __init__(self) -> None:
        self.total = Reading(0.0, 0.0)
        self._started: Reading | None = None

    def start(self) -> None:
        """Start or continue."""
        self._started = _now()

    def stop(self) -> None:
        """Pause."""
        assert self._started is not None, "the stopwatch is not running"
        now = _now()
        self.total = Reading(*(t + n - s for t, n, s in zip(self.total, now, self._started, strict=True)))
        self._started = None


def _now() -> Reading:
    return Reading(time.perf_counter(), time.process_time())


def interleave(variants: Mapping[K, Callable[[], Any]], rounds: int, warmup: int = 0) -> dict[K, list[Any]]:
    """Run each variant once per round, in an order that alternates between rounds, and collect what they return.

    Slow phases of the machine then affect all variants alike.

    Args:
        variants: functions by name
        rounds: rounds whose results are returned
        warmup: rounds before them whose results are dropped
    """
    results: dict[K, list[Any]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(-warmup, rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            result = variants[name]()
            if number >= 0:
                results[name].append(result)
    return results


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; three times the value if there is only one."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Distribution-free confidence interval of the median (sign test), with at least 95 % confidence.

    The bounds are the order statistics r and n + 1 - r. r is the largest rank for which at most r - 1 of n values lie
    below the median with a probability of at most 2.5 %, by the binomial distribution with p = 1/2. Fewer than 6 values
    give their range, with less confidence.
    """
    ranked, count = sorted(values), len(values)
    rank, below = 1, 1  # below: number of the 2**n outcomes with fewer than ``rank`` values below the median
    while 40 * (below + math.comb(count, rank)) <= 2**count:
        below += math.comb(count, rank)
        rank += 1
    return ranked[rank - 1], ranked[count - rank]


def seconds(readings: Sequence[Reading], kind: Clock = "wall") -> Spread:
    """Median and quartiles of the readings, in seconds."""
    return spread([getattr(reading, kind) for reading in readings])


def ratio(over: Sequence[Reading], under: Sequence[Reading], kind: Clock = "wall") -> Spread:
    """Median and quartiles of the ratios per round."""
    return spread(ratios(over, under, kind))


def ratios(over: Sequence[Reading], under: Sequence[Reading], kind: Clock = "wall") -> list[float]:
    """Ratio of two variants in each round."""
    return [getattr(a, kind) / getattr(b, kind) for a, b in zip(over, under, strict=True)]
