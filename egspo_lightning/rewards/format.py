"""Format reward: one boxed answer behind a closed think block."""

from __future__ import annotations

import re
from collections.abc import Sequence

from egspo_lightning.rewards.extraction import extract_boxed
from egspo_lightning.rewards.functions import Details, Reward
from egspo_lightning.rewards.think_blocks import FINAL_CHANNEL, THINK_MARK, THINK_MARKS, with_opened_block

# A backslash escapes the character after it: \\boxed{ is a line break and a word.
_BOX_OR_ESCAPE = re.compile(r"\\boxed\s*+\{|\\.", re.DOTALL)


class FormatReward(Reward):
    r"""1 for exactly one ``\boxed{}`` with an answer, behind a closed think block if there is one; 0 otherwise.

    A block exists if the prompt ends in a mark that opens one, such as ``<think>``, or if the completion holds such a
    mark (`THINK_MARKS` lists them). It must then be opened once, before anything else, and closed once. Its content is
    free, and boxes in it do not count. Text around the box is free.
    """

    def __call__(
        self, completions: Sequence[str], golds: Sequence[str], details: Sequence[Details] = ()
    ) -> list[float]:
        """Score completions, in their order; without ``details`` the prompts count as empty."""
        prompts = [detail.prompt for detail in details] or [""] * len(completions)
        return [float(is_well_formed(text, prompt)) for text, prompt in zip(completions, prompts, strict=True)]


def is_well_formed(text: str, prompt: str = "") -> bool:
    """Return whether a completion has one box, behind a closed think block if it or its prompt opens one."""
    text = with_opened_block(text, prompt).lstrip().removeprefix(FINAL_CHANNEL)
    if first := THINK_MARK.search(text):
        if first.start() > 0 or first[0] not in THINK_MARKS:
            return False
        block, _, text = text[first.end() :].partition(THINK_MARKS[first[0]])  # never closed: no text is left
        if first[0] in block or THINK_MARK.search(text):
            return False
    num_boxes = sum(token.endswith("{") and token != r"\{" for token in _BOX_OR_ESCAPE.findall(text))
    return num_boxes == 1 and extract_boxed(text) is not None
