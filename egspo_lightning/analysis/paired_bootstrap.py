"""Bootstrap statistics over seeds and problems; pure functions of arrays.

Scores are (S, P). Entry [s, p] is 1 if the policy of training seed s solves problem p, or the share of its samples that
are correct. All methods answer the same problems, and all methods of a seed start from the same checkpoint. Therefore
differences are paired.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

NUM_RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A mean with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(
    scores: Scores, *, confidence: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Estimate:
    """Mean over seeds and problems, with a percentile interval of the two-way bootstrap.

    Each resample draws S seeds and, independently, P problems with replacement, and averages over their product:
    m* = sum_s sum_p v_s w_p x_sp / (S P), with v and w the multinomial counts of the draws (pigeonhole bootstrap,
    Owen 2007, arXiv 0712.1111). The interval is slightly conservative for the interaction of seeds and problems. Like
    any bootstrap it underestimates the variance of few seeds. With one seed it covers the problems only.

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
    """Mean of method - baseline, with the interval of ``mean_interval``; both use the same resamples.

    Raises:
        ValueError: the shapes differ.
    """
    method, baseline = _matrix(method), _matrix(baseline)
    if method.shape != baseline.shape:
        raise ValueError(f"pairs need the same seeds and problems, got the shapes {method.shape} and {baseline.shape}")
    return mean_interval(method - baseline, confidence=confidence, num_resamples=num_resamples, seed=seed)


class Duels(NamedTuple):
    """Numbers of seeds on which a method is more accurate than the baseline, and as accurate."""

    won: int
    tied: int
    num_seeds: int


def duels(method: Scores, baseline: Scores) -> Duels:
    """Compare a method with the baseline seed by seed."""
    difference = _matrix(method).mean(1) - _matrix(baseline).mean(1)
    is_tie = np.isclose(difference, 0.0, rtol=0.0, atol=1e-12)
    return Duels(int((~is_tie & (difference > 0)).sum()), int(is_tie.sum()), len(difference))


def _matrix(scores: Scores) -> Scores:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"scores must be (seeds, problems), at least one of each, got the shape {scores.shape}")
    return scores


def _resampled_means(scores: Scores, num_resamples: int, seed: int) -> Scores:
    """Means of R resamples, (R,)."""
    num_seeds, num_problems = scores.shape
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_resamples)  # (R, S)
    problems = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=num_resamples)  # (R, P)
    sums: Scores = ((seeds @ scores) * problems).sum(1)
    return sums / scores.size
