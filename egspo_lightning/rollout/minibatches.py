"""Cutting a collection of rollouts into PPO epochs, updates and micro-batches.

Which completion belongs to which update is a pure function of (seed, epoch, problem), so an update holds the same
completions on one rank or many. Each update takes an even share of every problem's group, which keeps the mean
advantage near 0 in each.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from egspo_lightning.ops.padding import row_lengths, split_evenly
from egspo_lightning.types import RolloutBatch, UpdateSize


def plan_updates(
    problem_numbers: Sequence[int],
    num_generations: int,
    num_minibatches: int,
    num_ppo_epochs: int,
    *,
    seed: str,
) -> list[list[int]]:
    """Rows of this rank's collection for each update, in the order of the updates.

    Args:
        problem_numbers: number of each problem of this rank within the whole collection; its completions are the rows
            ``i * num_generations`` to ``(i + 1) * num_generations - 1``
        num_generations: G
        num_minibatches: updates an epoch
        num_ppo_epochs: passes over the collection, each in an order of its own
        seed: names the random orders
    """
    updates: list[list[int]] = [[] for _ in range(num_ppo_epochs * num_minibatches)]
    for epoch in range(num_ppo_epochs):
        for i, number in enumerate(problem_numbers):
            group = list(range(i * num_generations, (i + 1) * num_generations))
            random.Random(f"{seed}/{epoch}/{number}").shuffle(group)
            for k, row in enumerate(group):
                minibatch = (k * num_minibatches // num_generations + number) % num_minibatches
                updates[epoch * num_minibatches + minibatch].append(row)
    return updates


def count_updates(rollout: RolloutBatch, updates: Sequence[Sequence[int]], *, keep_inactive: bool) -> Tensor:
    """This rank's part of each update's size: completion tokens, sequences, tokens that take part. (U, 3) float64"""
    lengths = rollout.completion_mask.sum(-1).tolist()
    active = _active_rows(rollout)
    return torch.tensor(
        [
            [
                sum(lengths[row] for row in rows),
                len(rows),
                sum(lengths[row] for row in rows if keep_inactive or row in active),
            ]
            for rows in updates
        ],
        dtype=torch.float64,
    )


def micro_batches(
    rollout: RolloutBatch, rows: Sequence[int], parts: int, size: UpdateSize, *, keep_inactive: bool
) -> list[RolloutBatch]:
    """An update's rows as micro-batches of like length, each cut to its longest row.

    Rows whose advantage is 0 contribute nothing to the surrogate: unless they are to be kept they are left out, while
    the normaliser still counts them.
    """
    active = _active_rows(rollout)
    kept = [row for row in rows if keep_inactive or row in active]
    lengths = row_lengths(rollout.completion_mask).tolist()
    kept.sort(key=lambda row: lengths[row])
    return [_select(rollout, part, lengths, size) for part in split_evenly(kept, parts)]


def _active_rows(rollout: RolloutBatch) -> set[int]:
    """The rows that have a token with an advantage other than 0."""
    has_any = ((rollout.advantages != 0) & rollout.completion_mask).any(-1)
    return set(has_any.nonzero().flatten().tolist())


def _select(rollout: RolloutBatch, rows: list[int], lengths: list[int], size: UpdateSize) -> RolloutBatch:
    """Some rows of a collection; without any, its first row with nothing to train on, so that every rank steps."""
    is_blank = not rows
    rows = rows or [0]
    index = torch.as_tensor(rows, dtype=torch.long, device=rollout.input_ids.device)
    width = 2 if is_blank else max(lengths[row] for row in rows)

    def cut(values: Tensor) -> Tensor:
        return values[index, :width]

    mask = cut(rollout.completion_mask)
    return rollout._replace(
        input_ids=cut(rollout.input_ids),
        completion_mask=torch.zeros_like(mask) if is_blank else mask,
        old_logprobs=cut(rollout.old_logprobs),
        entropies=cut(rollout.entropies),
        ref_logprobs=None if rollout.ref_logprobs is None else cut(rollout.ref_logprobs),
        advantages=cut(rollout.advantages),
        rewards=rollout.rewards[index],
        update_size=size,
    )
