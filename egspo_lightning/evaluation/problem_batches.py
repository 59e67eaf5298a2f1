"""Cutting a benchmark into the batches that each rank answers."""

from collections.abc import Sequence

from egspo_lightning.types import Problem, ProblemBatch, Sampling


def problem_batches(
    name: str,
    problems: Sequence[Problem],
    num_samples: int,
    sampling: Sampling,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
) -> list[ProblemBatch]:
    """Every ``world_size``-th problem, ``batch_size`` at a time.

    All ranks get the same number of batches, so that none waits for another in vain; the last may be empty.
    """
    share = problems[rank::world_size]
    num_batches = -(-len(problems) // (world_size * batch_size))
    return [
        ProblemBatch(name, list(share[i * batch_size : (i + 1) * batch_size]), num_samples, sampling)
        for i in range(num_batches)
    ]
