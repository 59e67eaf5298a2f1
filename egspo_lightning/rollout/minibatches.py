"""Cutting a collection of rollouts into PPO epochs, updates and micro-batches.

Which completion belongs to which update is a pure function of (seed, epoch, problem), so an update holds the same
completions on one rank or many. Each update takes an even share of every problem's group, which keeps the mean
advantage near 0 in each.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from egspo_lightning.ops.masking import Total
from egspo_lightning.ops.padding import row_lengths, split_evenly
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


def cut_updates(
    rollout: RolloutBatch, plan: Sequence[Sequence[int]], parts: int, *, keep_inactive: bool, total: Total
) -> Iterator[list[RolloutBatch]]:
    """Each update of a plan as ``parts`` micro-batches, stamped with the update's size over all ranks.

    Args:
        rollout: this rank's collection
        plan: rows of each update, see ``plan_updates``
        parts: micro-batches an update
        keep_inactive: whether rows of advantage 0 take part
        total: adds a tensor over all ranks
    """
    max_length = rollout.update_size.max_length
    counts = total(count_updates(rollout, plan, keep_inactive=keep_inactive)).tolist()
    for rows, (tokens, sequences, active, sampled) in zip(plan, counts, strict=True):
        size = UpdateSize(tokens, sequences, max_length, active, sampled)
        yield micro_batches(rollout, rows, parts, size, keep_inactive=keep_inactive)


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


def micro_batches(
    rollout: RolloutBatch, rows: Sequence[int], parts: int, size: UpdateSize, *, keep_inactive: bool
) -> list[RolloutBatch]:
    """An update's rows as micro-batches of like length, each cut to its longest row.

    Rows whose advantage is 0 contribute nothing to the surrogate: unless they are to be kept they are left out, while
    the normaliser still counts them. Rows without tokens are left out in any case.
    """
    kept = _kept_rows(rollout, keep_inactive)
    lengths = row_lengths(rollout.completion_mask).tolist()
    chosen = sorted((row for row in rows if row in kept), key=lambda row: lengths[row])
    return [_select(rollout, part, lengths, size) for part in split_evenly(chosen, parts)]


def _kept_rows(rollout: RolloutBatch, keep_inactive: bool) -> set[int]:
    """The rows that have a token to train on: one with an advantage other than 0, unless every token is."""
    tokens = rollout.completion_mask if keep_inactive else (rollout.advantages != 0) & rollout.completion_mask
    return set(tokens.any(-1).nonzero().flatten().tolist())


def _select(rollout: RolloutBatch, rows: list[int], lengths: list[int], size: UpdateSize) -> RolloutBatch:
    """Some rows of a collection; without any, its first row with nothing to train on, so that every rank steps."""
    is_blank = not rows
    rows = rows or [0]
    index = torch.as_tensor(rows, dtype=torch.long, device=rollout.input_ids.device)
    width = 2 if is_blank else max(lengths[row] for row in rows)

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
