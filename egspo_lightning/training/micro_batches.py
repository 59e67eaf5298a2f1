"""Optimizer steps over a rollout batch, and the micro-batches of each step on one rank.

The minibatch of a completion depends only on the seed, the rollout batch, the PPO epoch and its place in the batch.
So an optimizer step holds the same completions on one rank or many. Each group is spread evenly over the minibatches,
so that the mean advantage of each minibatch is near 0.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egspo_lightning.data.expert_pool import ExpertShare
from egspo_lightning.ops.batching import BLANK_TOKENS, balanced_batches, batches_within, row_lengths
from egspo_lightning.ops.masking import Total
from egspo_lightning.types import RolloutBatch, Stage, TrainingBatch, UpdateSize


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
    """This rank's whole rollout batch, with the size of the optimizer step."""
    rows: list[int]
    """Its rows in this step."""
    lengths: list[int]
    """Tokens of each row, prompt included."""

    def batch(self, places: Sequence[int]) -> RolloutBatch:
        """Select a micro-batch, cut to its longest row; without rows it is one blank row.

        Args:
            places: positions in ``rows``
        """
        if not places:
            blank = _select_rows(self.rollout, [0], BLANK_TOKENS)
            return blank._replace(completion_mask=torch.zeros_like(blank.completion_mask))
        width = max(self.lengths[place] for place in places)
        return _select_rows(self.rollout, [self.rows[place] for place in places], width)


def share_optimizer_steps(
    rollout: RolloutBatch, plan: Sequence[Sequence[int]], *, keep_inactive: bool, total: Total
) -> list[RolloutShare]:
    """This rank's share of each optimizer step of a plan, with the size of the step over all ranks.

    Rows of advantage 0 contribute nothing to the surrogate. They are left out unless ``keep_inactive``, and still count
    in the normalizer N. Rows without tokens in the loss are always left out.

    Args:
        rollout: this rank's rollout batch
        plan: rows of each optimizer step, from ``plan_optimizer_steps``
        keep_inactive: whether rows of advantage 0 take part
        total: adds a tensor over all ranks
    """
    counts = total(count_steps(rollout, plan, keep_inactive=keep_inactive)).tolist()
    is_kept, lengths = _is_kept(rollout, keep_inactive).tolist(), row_lengths(rollout.completion_mask).tolist()
    shares = []
    for rows, (tokens, sequences, active, sampled) in zip(plan, counts, strict=True):
        kept = [row for row in rows if is_kept[row]]
        size = UpdateSize(tokens, sequences, rollout.update_size.max_length, active, sampled)
        shares.append(RolloutShare(rollout._replace(update_size=size), kept, [lengths[row] for row in kept]))
    return shares


def count_steps(rollout: RolloutBatch, plan: Sequence[Sequence[int]], *, keep_inactive: bool) -> Tensor:
    """This rank's part of the size of each optimizer step, (number of steps, 4) float64.

    The columns are tokens in the loss, their sequences, active tokens, and active tokens that the policy sampled.
    """
    lengths = rollout.loss_mask.sum(-1).double()
    active = lengths * _is_kept(rollout, keep_inactive)
    counts = torch.stack([lengths, (lengths > 0).double(), active, active * ~rollout.is_expert], dim=1).cpu()
    return torch.stack([counts[list(rows)].sum(0) for rows in plan])


def _is_kept(rollout: RolloutBatch, keep_inactive: bool) -> Tensor:
    """Whether to train on a row, (B,): it has a token in the loss and, if inactive rows are dropped, an advantage."""
    tokens = rollout.loss_mask if keep_inactive else (rollout.advantages != 0) & rollout.loss_mask
    return tokens.any(-1)


def _select_rows(rollout: RolloutBatch, rows: list[int], width: int) -> RolloutBatch:
    """Take rows of every tensor, and the first ``width`` tokens of those that have one entry per token."""
    index = torch.as_tensor(rows, dtype=torch.long, device=rollout.input_ids.device)

    def select(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[index, :width] if value.shape == rollout.input_ids.shape else value[index]

    return rollout._replace(**{name: select(value) for name, value in rollout._asdict().items()})


class StepShare(NamedTuple):
    """One rank's rows of an optimizer step: rollouts, demonstrations or both."""

    rollouts: RolloutShare | None
    experts: ExpertShare | None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, prompt included: rollouts, then demonstrations."""
        return [length for share in (self.rollouts, self.experts) if share is not None for length in share.lengths]

    def num_needed(self, max_tokens: int) -> int:
        """The fewest micro-batches of at most ``max_tokens`` tokens each, blank rows included."""
        is_mixed = self.rollouts is not None and self.experts is not None
        room = max_tokens - (BLANK_TOKENS if is_mixed else 0)
        assert max(self.lengths, default=0) <= room, "a row is longer than a micro-batch may be"
        return max(len(batches_within(self.lengths, room)), 1)

    def micro_batches(self, number: int) -> Iterator[TrainingBatch]:
        """Split into ``number`` micro-batches, balanced by tokens, of rows of similar length.

        Rollouts and demonstrations of a micro-batch go through one forward pass, so they are split together.
        """
        num_rollouts = 0 if self.rollouts is None else len(self.rollouts.rows)
        for places in balanced_batches(self.lengths, number):
            sampled = [place for place in places if place < num_rollouts]
            expert = [place - num_rollouts for place in places if place >= num_rollouts]
            yield TrainingBatch(
                stage=Stage.SFT if self.rollouts is None else Stage.EGSPO,
                rollout=None if self.rollouts is None else self.rollouts.batch(sampled),
                expert=None if self.experts is None else self.experts.batch(expert),
            )
