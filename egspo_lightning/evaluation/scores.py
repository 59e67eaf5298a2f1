"""Benchmark metrics from answers: one row of counts per problem, summed over batches and ranks."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from egspo_lightning.evaluation.answers import Answer
from egspo_lightning.evaluation.metrics import majority_at_k, pass_at_k, reported_ks, standard_error
from egspo_lightning.types import Problem

COLUMNS = ("num_seen", "num_correct", "majority", "num_tokens", "num_truncated", "num_timeouts", "num_crashes")
"""Counts of one problem over its n samples; num_seen is 1 once it is answered, and majority is in [0, 1]."""


class BenchmarkMetric(Metric):
    """Accumulates the answers to a benchmark; each rank may have any share of the problems.

    Args:
        problems: All problems of the benchmark.
        num_samples: n, the number of answers to each problem.
    """

    full_state_update = False
    table: Tensor
    """(P, columns) float64: the counts of each problem, 0 where another rank has it."""

    def __init__(self, problems: Sequence[Problem], num_samples: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_samples = num_samples
        self._rows = {problem.id: row for row, problem in enumerate(problems)}
        self.add_state("table", torch.zeros(len(problems), len(COLUMNS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, answers: Sequence[Answer]) -> None:
        """Add answers, all n of a problem adjacent. A problem that comes again is counted once."""
        for problem, adjacent in groupby(answers, key=lambda answer: answer.problem):
            group = list(adjacent)
            assert len(group) == self.num_samples, f"{problem.id}: {len(group)} of {self.num_samples} answers"
            self.table[self._rows[problem.id]] = torch.tensor(_counts(group), dtype=torch.float64)

    def compute(self) -> Tensor:
        """The table over all ranks, for ``summary`` and ``by_label``."""
        return self.table


def summary(table: Tensor, num_samples: int) -> dict[str, float]:
    """Compute the metrics over the problems that were answered.

    avg@n with its standard error over problems, pass@k, maj@n, length_mean (tokens), truncated_fraction,
    grader_timeouts and grader_crashes (counts), num_problems.
    """
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table.tolist() if row[0] > 0]
    n, total = num_samples, {name: sum(row[name] for row in rows) for name in COLUMNS}
    count = max(len(rows), 1)
    passed = {k: sum(pass_at_k(n, round(row["num_correct"]), k) for row in rows) for k in reported_ks(n)}
    return {
        f"avg@{n}": total["num_correct"] / (n * count),
        **({f"avg@{n}_se": standard_error(accuracies(table, n))} if len(rows) > 1 else {}),
        **{f"pass@{k}": value / count for k, value in passed.items()},
        f"maj@{n}": total["majority"] / count,
        "length_mean": total["num_tokens"] / (n * count),
        "truncated_fraction": total["num_truncated"] / (n * count),
        "grader_timeouts": total["num_timeouts"],
        "grader_crashes": total["num_crashes"],
        "num_problems": float(len(rows)),
    }


def accuracies(table: Tensor, num_samples: int) -> list[float]:
    """The share of correct answers to each problem that was answered."""
    return [correct / num_samples for seen, correct, *_ in table.tolist() if seen > 0]


def by_label(table: Tensor, labels: Sequence[str], num_samples: int) -> dict[str, dict[str, float]]:
    """Compute ``summary`` for each label, in sorted order; empty where all problems have the same label.

    Args:
        table: (P, columns)
        labels: the subject or level of each problem; empty where it has none
        num_samples: n
    """
    if len(set(labels)) < 2:
        return {}
    names = sorted(set(labels) - {""})
    return {name: summary(table[[label == name for label in labels]], num_samples) for name in names}


def _counts(group: Sequence[Answer]) -> list[float]:
    """The row of one problem, in the order of ``COLUMNS``."""
    correct = [bool(answer.correct) for answer in group]
    return [
        1.0,
        sum(correct),
        majority_at_k([answer.answer_class for answer in group], correct),
        sum(answer.length for answer in group),
        sum(answer.is_truncated for answer in group),
        sum(answer.status == "timeout" for answer in group),
        sum(answer.status == "crashed" for answer in group),
    ]
