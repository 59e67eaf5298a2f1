"""Expert demonstrations as token ids, in a shuffled order that all ranks share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from egspo_lightning.data.prompts import PromptEncoder
from egspo_lightning.data.sources import EndlessOrder
from egspo_lightning.errors import UserError
from egspo_lightning.ops.batching import BLANK_TOKENS, pad_right
from egspo_lightning.rewards.extraction import extract_boxed
from egspo_lightning.types import Demonstration, ExpertBatch, ExpertSolution, Problem, UpdateSize

MANY_DROPPED = 0.25
"""Share of demonstrations; where more of them are too long, a warning names the limits."""


class Encoded(NamedTuple):
    """One demonstration as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]
    """With the EOS, or the token that ends a turn in the chat template."""
    demonstration: Demonstration


class ExpertShare(NamedTuple):
    """One rank's share of the demonstrations of an optimizer step."""

    items: Sequence[Encoded]
    size: UpdateSize
    """The size of the optimizer step over all ranks."""
    pad_id: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each demonstration, prompt included."""
        return [len(item.prompt_ids) + len(item.completion_ids) for item in self.items]

    def batch(self, places: Sequence[int]) -> ExpertBatch:
        """A micro-batch of the items at ``places``; without places, one blank row, since every rank must step."""
        if not places:
            blank = torch.full((1, BLANK_TOKENS), self.pad_id)
            return ExpertBatch(blank, torch.zeros_like(blank, dtype=torch.bool), self.size)
        pairs = [(self.items[place].prompt_ids, self.items[place].completion_ids) for place in places]
        return ExpertBatch(*pad_right(pairs, self.pad_id), self.size)


@dataclass(frozen=True)
class ExpertPool:
    """Encoded demonstrations, and the number that were dropped because they are too long."""

    demonstrations: list[Encoded]
    num_dropped: int
    max_length: int
    pad_id: int
    seed: int
    num_wrong: int = 0
    """Number that were dropped because the grader marks them wrong, see ``drop_wrong``."""
    num_unanswered: int = 0
    """Number that are kept without an answer."""
    warning: str | None = None
    """Warning to print where many are too long."""

    @classmethod
    def encode(
        cls, demonstrations: Sequence[Demonstration], encoder: PromptEncoder, *, max_completion_length: int, seed: int
    ) -> "ExpertPool":
        """Tokenize demonstrations, and drop those above a limit: a truncated solution has no answer.

        Raises:
            UserError: no demonstration is short enough.
        """
        template, tokenizer = encoder.template, encoder.tokenizer
        encoded = [Encoded(*template.encode_demonstration(tokenizer, item), item) for item in demonstrations]
        lengths = [(len(item.prompt_ids), len(item.completion_ids)) for item in encoded]
        limits = encoder.max_length, max_completion_length
        kept = [item for item, (p, c) in zip(encoded, lengths, strict=True) if p <= limits[0] and c <= limits[1]]
        num_dropped = len(encoded) - len(kept)
        if not kept:
            prompt, completion = map(min, zip(*lengths, strict=True))
            raise UserError(
                f"data.demonstrations: none of {len(encoded)} fits data.max_prompt_length = {limits[0]} and "
                f"data.max_completion_length = {max_completion_length}. The shortest prompt has {prompt} tokens, the "
                f"shortest solution {completion}. Raise the limits."
            )
        prompt, completion = map(max, zip(*lengths, strict=True))
        warning = (
            f"data.demonstrations: {num_dropped} of {len(encoded)} are dropped, because they exceed "
            f"data.max_prompt_length = {limits[0]} or data.max_completion_length = {max_completion_length} tokens. The "
            f"longest prompt has {prompt} tokens, the longest solution {completion}. Raise the limits to keep them."
        )
        is_large = num_dropped > MANY_DROPPED * len(encoded)
        pad = tokenizer.pad_token_id
        return cls(kept, num_dropped, max_completion_length, pad, seed, warning=warning if is_large else None)

    def draw(self, start: int, count: int) -> list[Encoded]:
        """Demonstrations number ``start`` to ``start + count - 1`` of an endless order: each once per pass."""
        return self._order.draw(start, count)

    def require_answers(self) -> None:
        """Refuse demonstrations that could not be graded among rollouts.

        Raises:
            UserError: a demonstration does not end in an answer.
        """
        for item in self.demonstrations:
            _as_problem(item.demonstration)

    def solutions(self, start: int, count: int) -> list[ExpertSolution]:
        """Demonstrations of a second endless order, as problems with their answers, for use among rollouts."""
        chosen = self._solution_order.draw(start, count)
        return [ExpertSolution(_as_problem(item.demonstration), item.completion_ids) for item in chosen]

    @cached_property
    def _solution_order(self) -> EndlessOrder[Encoded]:
        return EndlessOrder(self.demonstrations, f"{self.seed}/expert-rollouts")

    @cached_property
    def _order(self) -> EndlessOrder[Encoded]:
        return EndlessOrder(self.demonstrations, f"{self.seed}/expert")

    def share(self, update: Sequence[Encoded], rank: int, world_size: int) -> ExpertShare:
        """One rank's share of an optimizer step: every ``world_size``-th of the demonstrations in ``update``."""
        num_tokens = float(sum(len(item.completion_ids) for item in update))
        size = UpdateSize(num_tokens, float(len(update)), float(self.max_length), num_tokens, num_sampled_tokens=0.0)
        return ExpertShare(update[rank::world_size], size, self.pad_id)


def _as_problem(demonstration: Demonstration) -> Problem:
    answer = extract_boxed(demonstration.solution)
    if answer is None:
        raise UserError(
            f"data.expert_fraction: demonstration {demonstration.id!r} has no answer in \\boxed{{}}, so it cannot "
            "be used among rollouts. Drop it, or set expert_fraction to 0."
        )
    context, columns = demonstration.context, demonstration.columns
    return Problem(demonstration.id, demonstration.problem, answer, context=context, columns=columns)
