"""Metrics of math benchmarks over n samples per problem: avg@n, pass@k and maj@n.

``avg@n`` is the mean accuracy, ``pass@k`` the probability that at least one of k samples is correct, and ``maj@n`` the
accuracy of the most frequent answer. All are in [0, 1].
"""

import math
import random
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct.

    ``1 - C(n - c, k) / C(n, k)`` (arXiv 2107.03374, eq. 1)

    Raises:
        ValueError: not 1 <= k <= num_samples, or not 0 <= num_correct <= num_samples.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"1 <= k <= num_samples and 0 <= num_correct <= num_samples must hold, got k = {k}, "
            f"num_samples = {num_samples}, num_correct = {num_correct}"
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def reported_ks(num_samples: int) -> list[int]:
    """Return the values of k to report: the powers of two below n, and n."""
    return [2**i for i in range((num_samples - 1).bit_length())] + [num_samples]


def majority_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Return 1 if the most frequent answer is correct, otherwise 0; for ties or mixed verdicts, the correct share.

    Args:
        answers: one per sample; equal values are one answer, and None (no answer) does not vote
        correct: the verdict on each sample
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    leaders = {answer for answer, count in votes.items() if count == most}
    right = sum(is_right for answer, is_right in zip(answers, correct, strict=True) if answer in leaders)
    return right / (most * len(leaders))


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean: ``sqrt(sum((v - mean)^2) / (P (P - 1)))`` (arXiv 2411.00640, eq. 1).

    The value of a problem is the mean of its n samples, so this is the error clustered by problem (section 2.2 there),
    with P - 1 in place of P. Samples of one problem are not independent.

    Raises:
        ValueError: there are fewer than two values.
    """
    return statistics.stdev(values) / math.sqrt(len(values))


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; values (usually one per problem) are resampled with replacement.

    Raises:
        ValueError: there are no values, or not 0 < confidence < 1.
    """
    if not values or not 0 < confidence < 1:
        raise ValueError(f"need values and 0 < confidence < 1, got {len(values)} values and {confidence}")
    rng = random.Random(seed)
    means = sorted(math.fsum(rng.choices(values, k=len(values))) / len(values) for _ in range(num_resamples))
    tail = (1 - confidence) / 2
    return means[int(tail * num_resamples)], means[min(int((1 - tail) * num_resamples), num_resamples - 1)]
