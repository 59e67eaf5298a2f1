"""Splits optimizer steps into micro-batches for one rank: a given number, or the fewest under a token budget."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from egspo_lightning.data.expert_pool import ExpertShare
from egspo_lightning.ops.batching import balanced_batches, batches_within
from egspo_lightning.training.minibatches import BLANK_TOKENS, RolloutShare
from egspo_lightning.types import Stage, TrainingBatch


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


def split_into_micro_batches(steps: Sequence[StepShare], number: int) -> Iterator[TrainingBatch]:
    """The micro-batches of all optimizer steps in order, ``number`` of them for each step."""
    for step in steps:
        yield from step.micro_batches(number)
