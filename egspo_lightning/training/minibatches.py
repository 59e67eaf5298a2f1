"""Cutting a collection of rollouts into PPO epochs and updates, and taking micro-batches out of it.

Which completion belongs to which update is a pure function of (seed, epoch, problem), so an update holds the same
completions on one rank or many. Each update takes an even share of every problem's group, which keeps the mean
advantage near 0 in each.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from egspo_lightning.ops.masking import Total
from egspo_lightning.ops.padding import row_lengths
from egspo_lightning.types import RolloutBatch, UpdateSize


def plan_updates(
    problem_numbers: Sequence[int],
    num_generations: int,
    num_minibatches: int,
    num_ppo_epochs: int,
    *,
    seed: str,
    expert_groups: Sequence[int] = (),
) -> list[list[int]]:
    """Rows of this rank's collection for each update, in the order of the updates.

    Args:
        problem_numbers: number of each problem of this rank within the whole collection; its completions are the rows
            ``i * num_generations`` to ``(i + 1) * num_generations - 1``, and those of experts the rows behind them all
        num_generations: G
        num_minibatches: updates an epoch
        num_ppo_epochs: passes over the collection, each in an order of its own
        seed: names the random orders
        expert_groups: for each row of an expert, which of this rank's problems it solves
    """
    first_expert = len(problem_numbers) * num_generations
    updates: list[list[int]] = [[] for _ in range(num_ppo_epochs * num_minibatches)]
    for epoch in range(num_ppo_epochs):
        for i, number in enumerate(problem_numbers):
            group = list(range(i * num_generations, (i + 1) * num_generations))
            random.Random(f"{seed}/{epoch}/{number}").shuffle(group)
            for k, row in enumerate(group):
                minibatch = (k * num_minibatches // num_generations + number) % num_minibatches
                updates[epoch * num_minibatches + minibatch].append(row)
        for e, i in enumerate(expert_groups):
            minibatch = (problem_numbers[i] + epoch) % num_minibatches
            updates[epoch * num_minibatches + minibatch].append(first_expert + e)
    return updates


class RolloutShare(NamedTuple):
    """The rows of this rank's collection that take part in an update."""

    rollout: RolloutBatch
    """the whole collection"""
    rows: list[int]
    lengths: list[int]
    """tokens of each, prompt included"""
    size: UpdateSize
    """of the update, over all ranks"""

    def batch(self, places: Sequence[int]) -> RolloutBatch:
        """A micro-batch of those of the rows that stand at some places among them, cut to the longest."""
        width = max((self.lengths[place] for place in places), default=0)
        return _select(self.rollout, [self.rows[place] for place in places], width, self.size)


def share_updates(
    rollout: RolloutBatch, plan: Sequence[Sequence[int]], *, keep_inactive: bool, total: Total
) -> list[RolloutShare]:
    """Each update of a plan, with its size over all ranks.

    Rows whose advantage is 0 contribute nothing to the surrogate: unless they are to be kept they are left out, while
    the normalizer still counts them. Rows without tokens are left out in any case.

    Args:
        rollout: this rank's collection
        plan: rows of each update, see ``plan_updates``
        keep_inactive: whether rows of advantage 0 take part
        total: adds a tensor over all ranks
    """
    max_length = rollout.update_size.max_length
    counts = total(count_updates(rollout, plan, keep_inactive=keep_inactive)).tolist()
    kept, lengths = _kept_rows(rollout, keep_inactive), row_lengths(rollout.completion_mask).tolist()
    shares = []
    for rows, (tokens, sequences, active, sampled) in zip(plan, counts, strict=True):
        chosen = [row for row in rows if row in kept]
        size = UpdateSize(tokens, sequences, max_length, active, sampled)
        shares.append(RolloutShare(rollout, chosen, [lengths[row] for row in chosen], size))
    return shares


def count_updates(rollout: RolloutBatch, updates: Sequence[Sequence[int]], *, keep_inactive: bool) -> Tensor:
    """This rank's part of each update's size, (U, 4) float64.

    Completion tokens, sequences, tokens that take part, and those of them that the policy sampled.
    """
    lengths = rollout.completion_mask.sum(-1).tolist()
    kept = _kept_rows(rollout, keep_inactive)
    kept_sampled = kept - set(rollout.is_expert.nonzero().flatten().tolist())
    return torch.tensor(
        [
            [
                sum(lengths[row] for row in rows),
                sum(lengths[row] > 0 for row in rows),
                sum(lengths[row] for row in rows if row in kept),
                sum(lengths[row] for row in rows if row in kept_sampled),
            ]
            for rows in updates
        ],
        dtype=torch.float64,
    )


def _kept_rows(rollout: RolloutBatch, keep_inactive: bool) -> set[int]:
    """The rows that have a token to train on: one with an advantage other than 0, unless every token is."""
    tokens = rollout.completion_mask if keep_inactive else (rollout.advantages != 0) & rollout.completion_mask
    return set(tokens.any(-1).nonzero().flatten().tolist())


def _select(rollout: RolloutBatch, rows: list[int], width: int, size: UpdateSize) -> RolloutBatch:
    """Some rows of a collection; without any, two tokens of its first with nothing to train on: every rank steps."""
    is_blank = not rows
    rows, width = (rows, width) if rows else ([0], 2)
    index = torch.as_tensor(rows, dtype=torch.long, device=rollout.input_ids.device)

    def cut(values: Tensor) -> Tensor:
        return values[index, :width]

    def cut_optional(values: Tensor | None) -> Tensor | None:
        return None if values is None else cut(values)

    mask = cut(rollout.completion_mask)
    return rollout._replace(
        input_ids=cut(rollout.input_ids),
        completion_mask=torch.zeros_like(mask) if is_blank else mask,
        old_logprobs=cut(rollout.old_logprobs),
        entropies=cut(rollout.entropies),
        ref_logprobs=cut_optional(rollout.ref_logprobs),
        old_values=cut_optional(rollout.old_values),
        advantages=cut(rollout.advantages),
        returns=cut_optional(rollout.returns),
        rewards=rollout.rewards[index],
        is_expert=rollout.is_expert[index],
        threshold=rollout.threshold[index],
        weight_scale=rollout.weight_scale[index],
        sampled_logprobs=cut_optional(rollout.sampled_logprobs),
        update_size=size,
    )
