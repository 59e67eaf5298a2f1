"""Decoding of completions to the texts that the grader judges: those of rollouts, answers and demonstrations alike."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from egspo_lightning.rewards.think_blocks import is_part_of_mark, with_opened_block


class Decoded(NamedTuple):
    """A completion as text."""

    prompt: str
    """Its prompt, with special tokens."""
    text: str
    """The completion, without special tokens other than those in marks around reasoning."""

    @property
    def judged(self) -> str:
        """The text that the grader judges: the completion within the block of reasoning that its prompt opens."""
        return with_opened_block(self.text, self.prompt)


def decode(tokenizer: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Decoded]:
    """Decode token ids of completions and of their prompts, one for each; each distinct prompt is decoded once."""
    added = tokenizer.added_tokens_decoder.items()
    dropped = {number for number, token in added if token.special and not is_part_of_mark(token.content)}
    kept = [[token for token in completion if token not in dropped] for completion in completions]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=False)
    keys = [tuple(prompt) for prompt in prompts]
    distinct = list(dict.fromkeys(keys))
    asked = dict(zip(distinct, tokenizer.batch_decode(distinct, skip_special_tokens=False), strict=True))
    return [Decoded(asked[key], text) for key, text in zip(keys, texts, strict=True)]
