"""Check of demonstrations: grades each behind its prompt, as rollouts are graded, and drops those that are wrong.

SFT would teach a form that gets no reward. An answer that is found as the solution writes it is right. The grader is
asked about others alone, so the check costs little more than decoding.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from egspo_lightning.data.decoding import Decoded, decode
from egspo_lightning.data.expert_pool import Encoded, ExpertPool
from egspo_lightning.errors import UserError
from egspo_lightning.rewards.extraction import extract_boxed
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rewards.think_blocks import THINK_MARKS, opened_block

_UNDECIDED = ("timeout", "crashed")  # these depend on the machine's load, and ranks must keep the same demonstrations


def drop_wrong(pool: ExpertPool, tokenizer: Any, grader: MathGrader, *, needs_answers: bool) -> ExpertPool:
    """Drop the demonstrations that the grader marks wrong behind their prompts.

    Args:
        pool: the encoded demonstrations
        tokenizer: decodes their tokens, as those of rollouts
        grader: the grader of rollouts; a demonstration's gold answer is the one in its own solution
        needs_answers: whether to drop demonstrations without an answer as well, because a rollout like them would get
            no reward; otherwise they are kept and counted

    Raises:
        UserError: no demonstration is left.
    """
    items = pool.demonstrations
    decoded = decode(tokenizer, [item.prompt_ids for item in items], [item.completion_ids for item in items])
    answers = [extract_boxed(item.demonstration.solution) for item in items]
    wrong = _wrong_places(answers, [it.judged for it in decoded], grader)
    unanswered = {place for place, answer in enumerate(answers) if answer is None}
    dropped = wrong | unanswered if needs_answers and grader.extraction == "boxed" else wrong
    if len(dropped) == len(items):
        raise UserError(_refusal(items[0], decoded[0], len(items), has_answer=answers[0] is not None))
    kept = [item for place, item in enumerate(items) if place not in dropped]
    return replace(pool, demonstrations=kept, num_wrong=len(dropped), num_unanswered=len(unanswered - dropped))


def _wrong_places(answers: Sequence[str | None], judged: Sequence[str], grader: MathGrader) -> set[int]:
    """Places of the demonstrations that have an answer which the grader does not accept in the judged text."""
    found = [extract_boxed(text) for text in judged]
    unsure = [place for place, answer in enumerate(answers) if answer is not None and answer != found[place]]
    grades = grader.grade([judged[place] for place in unsure], [answers[place] or "" for place in unsure])
    graded = zip(unsure, grades, strict=True)
    return {place for place, grade in graded if not grade.correct and grade.status not in _UNDECIDED}


def _refusal(item: Encoded, decoded: Decoded, number: int, *, has_answer: bool) -> str:
    """The message for demonstrations that are all wrong, with the first of them."""
    mark, tail = opened_block(decoded.prompt), decoded.text.strip()[-60:]
    found, remedy = "its answer is not found", ""
    if not has_answer:
        found = "it has no answer in \\boxed{}"
        remedy = " To train without graded answers, choose another data.reward, or set stage_transition.enabled: false."
    block = f" The prompt opens a block of reasoning by {mark}, which {THINK_MARKS[mark]} closes." if mark else ""
    return (
        f"data.demonstrations: the grader of rollouts marks all {number} of them wrong behind their prompts. In the "
        f"first, {item.demonstration.id!r}, {found}; its tokens end in {tail!r}.{block} End each solution in "
        f"\\boxed{{answer}}, after any reasoning.{remedy}"
    )
