"""Pure statistics of methods x seeds x problems; arrays in, numbers out.

Scores are (S, P): a training seed and a problem; entry [s, p] is 1 where the policy of seed s solves problem p (or the
share of its answers that are right). All methods answer the same problems, and all methods of a seed start from the
same checkpoint, so that differences are taken pair by pair.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

NUM_RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A mean with the bounds of its interval."""

    mean: float
    low: float
    high: float


def mean_interval(
    scores: Scores, *, confidence: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean over seeds and problems, with a percentile interval by bootstrap on two levels.

    Each resample draws S seeds and, independently, P problems with replacement, and takes the mean over their
    product: m* = sum_s sum_p v_s w_p x_sp / (S P), with v and w the multinomial counts of the draws (the pigeonhole
    bootstrap, Owen 2007, arXiv 0712.1111). It is slightly wide, never narrow, in what seeds and problems have to
    themselves together; with few seeds, as any bootstrap, it knows only their spread. Of one seed, only problems vary.

    Raises:
        ValueError: scores are not (S, P) with S, P >= 1, or not 0 < confidence < 1.
    """
    scores = _matrix(scores)
    if not 0 < confidence < 1:
        raise ValueError(f"0 < confidence < 1 must hold, got {confidence}")
    means = _resampled_means(scores, num_resamples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(scores.mean()), float(low), float(high))


def paired_difference(
    method: Scores, baseline: Scores, *, confidence: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Estimate:
    """Mean of method - baseline, with the interval of ``mean_interval``: both share the draws of seeds and problems.

    Raises:
        ValueError: the two are not of the same shape.
    """
    method, baseline = _matrix(method), _matrix(baseline)
    if method.shape != baseline.shape:
        raise ValueError(f"pairs need the same seeds and problems, got {method.shape} and {baseline.shape}")
    return mean_interval(method - baseline, confidence=confidence, num_resamples=num_resamples, seed=seed)


def share_won(method: Scores, baseline: Scores) -> float:
    """Share of seeds in which the method is better than the baseline; a tie counts half."""
    difference = _matrix(method).mean(1) - _matrix(baseline).mean(1)
    is_tie = np.isclose(difference, 0.0, rtol=0.0, atol=1e-12)
    return float(np.where(is_tie, 0.5, difference > 0).mean())


def _matrix(scores: Scores) -> Scores:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"scores must be (seeds, problems), at least one of each, got the shape {scores.shape}")
    return scores


def _resampled_means(scores: Scores, num_resamples: int, seed: int) -> Scores:
    """(R,)"""
    num_seeds, num_problems = scores.shape
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_resamples)  # (R, S)
    problems = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=num_resamples)  # (R, P)
    sums: Scores = ((seeds @ scores) * problems).sum(1)
    return sums / scores.size
