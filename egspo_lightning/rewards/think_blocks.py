"""Blocks of reasoning, such as ``<think>...</think>``: their marks, and the text around them."""

from __future__ import annotations

import re

FINAL_CHANNEL = "<|channel|>final<|message|>"
"""Heading of an answer of gpt-oss, with or without reasoning before it."""
_ANALYSIS = "<|channel|>analysis<|message|>"
_NO_BUDGET = "<seed:think><seed:cot_budget_reflect>"
THINK_MARKS = {
    "<think>": "</think>",  # DeepSeek-R1, Qwen3, MiniMax-M2 and most others
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",  # EXAONE Deep
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",  # Seed-OSS
    _NO_BUDGET: "</seed:think>",  # Seed-OSS with a thinking budget of 0
    "[THINK]": "[/THINK]",  # Magistral
    "◁think▷": "◁/think▷",  # Kimi-VL
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
    "<|inner_prefix|>": "<|inner_suffix|>",  # Apertus
    "<|channel>thought": "<channel|>",  # Gemma 4
    _ANALYSIS: FINAL_CHANNEL,  # gpt-oss
}
"""Marks around reasoning, as chat templates write them: the mark that opens a block to the mark that closes it."""
_MARKS = sorted({*THINK_MARKS, *THINK_MARKS.values()}, key=len, reverse=True)
THINK_MARK = re.compile("|".join(map(re.escape, _MARKS)))
_CLOSING = THINK_MARKS | {
    _NO_BUDGET: "</seed:cot_budget_reflect></seed:think>",
    _ANALYSIS: "<|end|><|start|>assistant" + FINAL_CHANNEL,
}
"""Text that closes a block, where it is more than the mark."""


def after_reasoning(text: str) -> str:
    """Return the text after the last closed block of reasoning, without a block that is opened and never closed.

    Only a block's own mark closes it. A closing mark without an opening one ends reasoning as well.
    """
    start, opening = 0, None
    for mark in THINK_MARK.finditer(text):
        if opening is None and mark[0] in THINK_MARKS:
            opening = mark
        elif opening is None or mark[0] == THINK_MARKS[opening[0]]:
            start, opening = mark.end(), None
    return text[start : opening.start() if opening else None]


def opened_block(prompt: str) -> str | None:
    """Return the mark in which a prompt ends, if it opens a block of reasoning."""
    prompt = prompt.rstrip()
    return next((mark for mark in _MARKS if mark in THINK_MARKS and prompt.endswith(mark)), None)


def with_opened_block(text: str, prompt: str) -> str:
    """Return a completion, preceded by the mark of the block that its prompt opens, if it does."""
    return (opened_block(prompt) or "") + text


def close_opened_block(solution: str, prompt: str) -> str:
    r"""Return a solution as the text that continues its prompt, closing the block of reasoning that the prompt opens.

    A solution without reasoning closes the block at once, as chat templates render an empty block: with the whitespace
    that follows the opening mark, and twice that after the closing one. ``<think>\n`` is continued by
    ``\n</think>\n\n`` and the solution. One with reasoning loses an opening mark that repeats the prompt's.
    """
    mark = opened_block(prompt)
    if mark is None:
        return solution
    blank = prompt[len(prompt.rstrip()) :]
    if THINK_MARKS[mark] not in solution:
        return f"{blank}{_CLOSING[mark]}{blank * 2}{solution}"
    stripped = solution.lstrip()
    return stripped.removeprefix(mark).removeprefix(blank) if stripped.startswith(mark) else solution


def is_part_of_mark(token: str) -> bool:
    """Return whether a token occurs in a mark around reasoning, such as ``<|channel|>``."""
    return any(token in mark for mark in _MARKS)
