"""Plan of the optimizer steps over a rollout batch: PPO epochs, minibatches, and one rank's rows of each.

The minibatch of a completion is a pure function of (seed, epoch, problem), so an optimizer step holds the same
completions on one rank or many. Each group is spread evenly over the minibatches, so that the mean advantage of each
minibatch is near 0.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egspo_lightning.ops.masking import Total
from egspo_lightning.ops.padding import row_lengths
from egspo_lightning.types import RolloutBatch, UpdateSize

BLANK_TOKENS = 2
"""Length of the masked row that stands in for an empty micro-batch: every rank must run forward and backward."""


def plan_optimizer_steps(
    problem_numbers: Sequence[int],
    num_generations: int,
    num_minibatches: int,
    num_ppo_epochs: int,
    *,
    seed: str,
    expert_groups: Sequence[int] = (),
) -> list[list[int]]:
    """Rows of this rank's rollout batch for each optimizer step, in the order of the steps.

    Args:
        problem_numbers: index of each of this rank's problems in the whole rollout batch. The rows of the rank's i-th
            problem are ``i * num_generations`` to ``(i + 1) * num_generations - 1``; the expert rows come last
        num_generations: G
        num_minibatches: optimizer steps of a PPO epoch
        num_ppo_epochs: passes over the rollout batch, each in a different order
        seed: names the random orders
        expert_groups: for each expert row, the local index of its problem on this rank
    """
    first_expert = len(problem_numbers) * num_generations
    steps: list[list[int]] = [[] for _ in range(num_ppo_epochs * num_minibatches)]
    for epoch in range(num_ppo_epochs):
        for i, number in enumerate(problem_numbers):
            group = list(range(i * num_generations, (i + 1) * num_generations))
            random.Random(f"{seed}/{epoch}/{number}").shuffle(group)
            for k, row in enumerate(group):  # even shares; ``number`` rotates which minibatch gets the first one
                minibatch = (k * num_minibatches // num_generations + number) % num_minibatches
                steps[epoch * num_minibatches + minibatch].append(row)
        for e, i in enumerate(expert_groups):
            minibatch = (problem_numbers[i] + epoch) % num_minibatches
            steps[epoch * num_minibatches + minibatch].append(first_expert + e)
    return steps


class RolloutShare(NamedTuple):
    """One rank's rollouts of an optimizer step."""

    rollout: RolloutBatch
    """This rank's whole rollout batch."""
    rows: list[int]
    """Its rows in this step."""
    lengths: list[int]
    """Tokens of each row, prompt included."""
    size: UpdateSize
    """Size of the optimizer step, summed over ranks."""

    def batch(self, places: Sequence[int]) -> RolloutBatch:
        """Select a micro-batch, cut to its longest row; without rows it is one blank row.

        Args:
            places: positions in ``rows``
        """
        if not places:
            blank = _select_rows(self.rollout, [0], BLANK_TOKENS)
            mask = torch.zeros_like(blank.completion_mask)
            return blank._replace(completion_mask=mask, update_size=self.size)
        width = max(self.lengths[place] for place in places)
        return _select_rows(self.rollout, [self.rows[place] for place in places], width)._replace(update_size=self.size)


def share_optimizer_steps(
    rollout: RolloutBatch, plan: Sequence[Sequence[int]], *, keep_inactive: bool, total: Total
) -> list[RolloutShare]:
    """This rank's share of each optimizer step of a plan, with the size of the step over all ranks.

    Rows of advantage 0 contribute nothing to the surrogate. They are left out unless ``keep_inactive``, and still count
    in the normalizer N. Rows without tokens are always left out.

    Args:
        rollout: this rank's rollout batch
        plan: rows of each optimizer step, from ``plan_optimizer_steps``
        keep_inactive: whether rows of advantage 0 take part
        total: adds a tensor over all ranks
    """
    max_length = rollout.update_size.max_length
    counts = total(count_steps(rollout, plan, keep_inactive=keep_inactive)).tolist()
    kept, lengths = _kept_rows(rollout, keep_inactive), row_lengths(rollout.completion_mask).tolist()
    shares = []
    for rows, (tokens, sequences, active, sampled) in zip(plan, counts, strict=True):
        chosen = [row for row in rows if row in kept]
        size = UpdateSize(tokens, sequences, max_length, active, sampled)
        shares.append(RolloutShare(rollout, chosen, [lengths[row] for row in chosen], size))
    return shares


def count_steps(rollout: RolloutBatch, plan: Sequence[Sequence[int]], *, keep_inactive: bool) -> Tensor:
    """This rank's part of the size of each optimizer step, (number of steps, 4) float64.

    The columns are tokens, sequences, active tokens, and active tokens that the policy sampled.
    """
    lengths = rollout.completion_mask.sum(-1).tolist()
    kept = _kept_rows(rollout, keep_inactive)
    kept_sampled = kept - set(rollout.is_expert.nonzero().flatten().tolist())
    counts = [
        [
            sum(lengths[row] for row in rows),
            sum(lengths[row] > 0 for row in rows),
            sum(lengths[row] for row in rows if row in kept),
            sum(lengths[row] for row in rows if row in kept_sampled),
        ]
        for rows in plan
    ]
    return torch.tensor(counts, dtype=torch.float64)


def _kept_rows(rollout: RolloutBatch, keep_inactive: bool) -> set[int]:
    """Rows to train on: those with a completion token or, if inactive rows are dropped, one of nonzero advantage."""
    tokens = rollout.completion_mask if keep_inactive else (rollout.advantages != 0) & rollout.completion_mask
    return set(tokens.any(-1).nonzero().flatten().tolist())


def _select_rows(rollout: RolloutBatch, rows: list[int], width: int) -> RolloutBatch:
    """Take rows of every tensor, and the first ``width`` tokens of those that have one entry per token."""
    index = torch.as_tensor(rows, dtype=torch.long, device=rollout.input_ids.device)

    def select(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[index, :width] if value.shape == rollout.input_ids.shape else value[index]

    return rollout._replace(**{name: select(value) for name, value in rollout._asdict().items()})
