"""The metrics that the field reports for math benchmarks, over n samples a problem.

``avg@n`` is the mean accuracy, ``pass@k`` the chance that one of k samples is right, ``maj@n`` the accuracy of the
most frequent answer. All are in [0, 1]. Nothing here knows of models or files.
"""

import math
import random
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that one of k is right: ``1 - C(n - c, k) / C(n, k)`` (arXiv 2107.03374, eq. 1).

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
    """The k of pass@k: the powers of two below n, and n."""
    return [2**i for i in range((num_samples - 1).bit_length())] + [num_samples]


def majority_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer is right; of a tie, and of verdicts that differ on it, the share that are right.

    Args:
        answers: one a sample, equal where they count as the same; None is no answer, which does not vote
        correct: whether each is right
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

    With the mean of its n samples as the value of a problem, it is the error clustered by problem (section 2.2 there),
    with P - 1 where that has P: samples of one problem are no independent questions.

    Raises:
        ValueError: there are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a standard error needs at least two values, got {len(values)}")
    return statistics.stdev(values) / math.sqrt(len(values))


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling the values (problems, as a rule) with replacement.

    Raises:
        ValueError: there are no values, or not 0 < confidence < 1.
    """
    if not values or not 0 < confidence < 1:
        raise ValueError(f"need values and 0 < confidence < 1, got {len(values)} values and {confidence}")
    rng = random.Random(seed)
    means = sorted(math.fsum(rng.choices(values, k=len(values))) / len(values) for _ in range(num_resamples))
    tail = (1 - confidence) / 2
    return means[int(tail * num_resamples)], means[min(int((1 - tail) * num_resamples), num_resamples - 1)]
