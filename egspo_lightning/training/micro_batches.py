"""What of an update falls to one rank, and how it is cut into micro-batches."""

from collections.abc import Iterator
from typing import NamedTuple

from egspo_lightning.data.expert_pool import ExpertShare
from egspo_lightning.ops.batching import balanced_batches, batches_within
from egspo_lightning.training.minibatches import RolloutShare
from egspo_lightning.types import Stage, TrainingBatch

BLANK_TOKENS = 2
"""Tokens of the row that stands in a micro-batch for rollouts, or demonstrations, of which it has none."""


def longest_row(max_prompt_length: int, max_completion_length: int, *, is_mixed: bool) -> int:
    """Tokens of a micro-batch of one row at most; where an update has both kinds, a blank row is beside it."""
    return max_prompt_length + max_completion_length + (BLANK_TOKENS if is_mixed else 0)


class UpdateShare(NamedTuple):
    """A rank's rows of an update: rollouts in stage EGSPO, and demonstrations in stage SFT and where mu > 0."""

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

    def micro_batches(self, parts: int) -> Iterator[TrainingBatch]:
        """``parts`` micro-batches of rows of like length, of like numbers of tokens.

        Rollouts and demonstrations share the passes through the policy, so they are cut together.
        """
        num_rollouts = 0 if self.rollouts is None else len(self.rollouts.rows)
        for run in balanced_batches(self.lengths, parts):
            own = [row for row in run if row < num_rollouts]
            others = [row - num_rollouts for row in run if row >= num_rollouts]
            yield TrainingBatch(
                stage=Stage.SFT if self.rollouts is None else Stage.EGSPO,
                rollout=None if self.rollouts is None else self.rollouts.batch(own),
                expert=None if self.experts is None else self.experts.batch(others),
            )
