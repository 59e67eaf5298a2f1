"""Ways of doing the same, timed in turn, and what their readings say."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple


class Reading(NamedTuple):
    """One run."""

    wall: float
    """seconds"""
    cpu: float
    """seconds of processor time, all threads of the process: what a busy machine disturbs least"""


Clock = Literal["wall", "cpu"]


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


class Stopwatch:
    """Adds up what passes between ``start`` and ``stop``."""

    def __init__(self) -> None:
        self.total = Reading(0.0, 0.0)
        self._started: Reading | None = None

    def start(self) -> None:
        """Go on."""
        self._started = _now()

    def stop(self) -> None:
        """Pause."""
        assert self._started is not None, "the stopwatch is not running"
        now = _now()
        self.total = Reading(*(t + n - s for t, n, s in zip(self.total, now, self._started, strict=True)))
        self._started = None


def _now() -> Reading:
    return Reading(time.perf_counter(), time.process_time())


def clock(run: Callable[[], Any]) -> Reading:
    """Time one call."""
    watch = Stopwatch()
    watch.start()
    run()
    watch.stop()
    return watch.total


def in_turn(
    sides: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1, measure: Callable[..., Any] = clock
) -> dict[str, list[Any]]:
    """Each side once a round, in an order that is turned round from one round to the next, after a warm-up.

    Args:
        sides: what to run, by name
        rounds: rounds that count
        warmup: rounds before them that do not
        measure: what becomes of a run; its time by default
    """
    readings: dict[str, list[Any]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(-warmup, rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            reading = measure(sides[name])
            if number >= 0:
                readings[name].append(reading)
    return readings


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of fewer than two values the value itself."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of the population lies with at least 95 % confidence, whatever its distribution.

    Between order statistics r and n + 1 - r, where at most r - 1 of n values lie below it with a probability of no more
    than 2.5 %, being binomial with 1/2. Fewer than 6 values give their range, and less confidence.
    """
    ranked, count = sorted(values), len(values)
    rank, below = 1, 1  # below: how many of the 2 ** n ways have fewer than ``rank`` values below the median
    while 40 * (below + math.comb(count, rank)) <= 2**count:
        below += math.comb(count, rank)
        rank += 1
    return ranked[rank - 1], ranked[count - rank]


def seconds(readings: Sequence[Reading], kind: Clock = "wall") -> Spread:
    """Of one side."""
    return spread([getattr(reading, kind) for reading in readings])


def ratio(over: Sequence[Reading], under: Sequence[Reading], kind: Clock = "wall") -> Spread:
    """Of two sides, round by round: what slows the machine for a while slows both."""
    return spread(ratios(over, under, kind))


def ratios(over: Sequence[Reading], under: Sequence[Reading], kind: Clock = "wall") -> list[float]:
    """One a round."""
    return [getattr(a, kind) / getattr(b, kind) for a, b in zip(over, under, strict=True)]
