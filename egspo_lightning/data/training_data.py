"""Preparation of training data: removes benchmark problems, long ones and wrong demonstrations, and counts them."""

from collections.abc import Sequence
from typing import Literal

from egspo_lightning.data.answer_formats import normalize_problem
from egspo_lightning.data.demonstration_check import drop_wrong
from egspo_lightning.data.expert_pool import ExpertPool
from egspo_lightning.data.prompts import PromptEncoder
from egspo_lightning.data.sources import DemonstrationSource, FiniteProblems, ProblemSource
from egspo_lightning.errors import UserError
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.types import Demonstration, Problem

LongProblems = Literal["error", "drop"]


def load_demonstrations(
    source: DemonstrationSource,
    encoder: PromptEncoder,
    excluded: frozenset[str],
    *,
    max_completion_length: int,
    seed: int,
    grader: MathGrader,
    needs_answers: bool,
) -> tuple[ExpertPool, int]:
    """Load, encode and grade the demonstrations; also returns the number that were dropped as benchmark problems.

    Args:
        source: gives the demonstrations
        encoder: encodes their prompts
        excluded: normalized texts of benchmark problems
        max_completion_length: longest solution, in tokens
        seed: seed of their order
        grader: grades rollouts; see ``drop_wrong``
        needs_answers: whether demonstrations without an answer are dropped

    Raises:
        UserError: no demonstration is left.
    """
    loaded = source.load()
    if not loaded:
        raise UserError(f"data.demonstrations: {type(source).__name__} holds none. Give it a file with at least one.")
    clean = [item for item in loaded if normalize_problem(item.problem) not in excluded]
    if not clean:
        raise UserError(f"data.demonstrations: benchmarks ask all {len(loaded)} of them. Use others.")
    pool = ExpertPool.encode(clean, encoder, max_completion_length=max_completion_length, seed=seed)
    pool = drop_wrong(pool, encoder.tokenizer, grader, needs_answers=needs_answers)
    return pool, len(loaded) - len(clean)


def match_columns(
    reward: WeightedReward,
    problems: ProblemSource,
    source: DemonstrationSource,
    experts: Sequence[Demonstration],
) -> list[str]:
    """Check that the data has the columns that a reward names; returns sentences on what the reward receives.

    Args:
        reward: the reward of the rollouts
        problems: their problems, prepared
        source: the source of the demonstrations
        experts: those demonstrations that stand among the rollouts

    Raises:
        UserError: a column is missing, or has the name of another argument of the reward.
    """
    drawn = problems.problems if isinstance(problems, FiniteProblems) else problems.draw(0, 1)
    facts = reward.require_columns(_columns_of(drawn), problems.column_names)
    if experts:
        facts += reward.require_columns(_columns_of(experts), source.column_names)
    return list(dict.fromkeys(facts))


def _columns_of(items: Sequence[Problem | Demonstration]) -> list[str]:
    return list(dict.fromkeys(name for item in items for name in item.columns or ()))


def prepare_problems(
    source: ProblemSource, encoder: PromptEncoder, excluded: frozenset[str], *, long_problems: LongProblems, seed: int
) -> tuple[int, int]:
    """Fix the order of the problems; returns how many were dropped as benchmark problems, and as too long.

    All problems of a finite source are checked now, since a long one would otherwise end the run days later.

    Raises:
        UserError: a problem is too long and ``long_problems`` is "error", or no problem is left.
    """
    num_excluded = source.prepare(seed, excluded)
    if not isinstance(source, FiniteProblems):
        return num_excluded, 0
    template, tokenizer = encoder.template, encoder.tokenizer
    lengths = [len(template.encode(tokenizer, p.problem, p.context)) for p in source.problems]
    num_long = sum(length > encoder.max_length for length in lengths)
    if num_long and long_problems == "error":
        encoder.encode(source.problems[lengths.index(max(lengths))])
    if num_long == len(lengths):
        raise UserError(
            f"data.problems: all {num_long} have prompts of more than data.max_prompt_length = {encoder.max_length} "
            f"tokens; the shortest has {min(lengths)}. Raise it."
        )
    if num_long:
        source.keep([p for p, length in zip(source.problems, lengths, strict=True) if length <= encoder.max_length])
    return num_excluded, num_long
