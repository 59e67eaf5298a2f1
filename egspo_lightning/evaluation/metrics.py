"""The metrics that the field reports for math benchmarks, over n samples a problem.

``avg@n`` is the mean accuracy, ``pass@k`` the chance that one of k samples is right, ``maj@n`` the accuracy of the
most frequent answer. All are in [0, 1].
"""

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from egspo_lightning.types import Completion


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


def majority_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer is right; ties count by the share of the tied answers that are right.

    Args:
        answers: one a sample; None is no answer, which does not vote
        correct: whether each is right
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    leaders = [answer for answer, count in votes.items() if count == most]
    right = dict(zip(answers, correct, strict=True))
    return sum(right[answer] for answer in leaders) / len(leaders)


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


class BenchmarkMetric(Metric):
    """Accumulates the completions of a benchmark, over batches and ranks.

    Args:
        num_samples: n, completions a problem
    """

    full_state_update = False
    sums: Tensor
    num_problems: Tensor

    FIELDS = ("avg", "pass", "maj", "length", "truncated", "timeouts")

    def __init__(self, num_samples: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_samples = num_samples
        self.add_state("sums", torch.zeros(len(self.FIELDS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_problems", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, completions: Sequence[Completion]) -> None:
        """Add completions; the n of one problem stand next to one another."""
        for start in range(0, len(completions), self.num_samples):
            group = completions[start : start + self.num_samples]
            n, correct = len(group), [completion.correct for completion in group]
            values = (
                sum(correct) / n,
                pass_at_k(n, sum(correct), n),
                majority_at_k([completion.extracted for completion in group], correct),
                sum(len(completion.token_ids) for completion in group) / n,
                sum(completion.is_truncated for completion in group) / n,
                sum(completion.status == "timeout" for completion in group),
            )
            self.sums += torch.tensor(values, dtype=torch.float64, device=self.sums.device)
            self.num_problems += 1

    def compute(self) -> dict[str, float]:
        """Metric name to value: avg@n, pass@n, maj@n, length_mean (tokens), truncated_fraction, grader_timeouts."""
        count = max(float(self.num_problems), 1.0)
        total = dict(zip(self.FIELDS, self.sums.tolist(), strict=True))
        n = self.num_samples
        return {
            f"avg@{n}": total["avg"] / count,
            f"pass@{n}": total["pass"] / count,
            f"maj@{n}": total["maj"] / count,
            "length_mean": total["length"] / count,
            "truncated_fraction": total["truncated"] / count,
            "grader_timeouts": total["timeouts"],
            "num_problems": float(self.num_problems),
        }
