"""Preparation of training data: removes benchmark problems and long prompts, and counts them."""

from dataclasses import dataclass
from typing import Any, Literal

from egspo_lightning.data.answer_formats import normalize_problem
from egspo_lightning.data.expert_pool import ExpertPool
from egspo_lightning.data.prompts import PromptTemplate
from egspo_lightning.data.sources import DemonstrationSource, FiniteProblems, ProblemSource
from egspo_lightning.errors import UserError
from egspo_lightning.types import Problem

LongProblems = Literal["error", "drop"]


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes problems as token ids and refuses prompts that are too long."""

    template: PromptTemplate
    tokenizer: Any
    max_length: int

    def encode(self, problem: Problem) -> list[int]:
        """Return the token ids of the prompt.

        Raises:
            UserError: the prompt has more than ``max_length`` tokens.
        """
        ids = self.template.encode(self.tokenizer, problem.problem)
        if len(ids) > self.max_length:
            raise UserError(
                f"data.max_prompt_length = {self.max_length} is shorter than the prompt of problem {problem.id!r}, "
                f"which has {len(ids)} tokens. Raise it to {len(ids)} or more, or, for training problems, set "
                "data.long_problems: drop."
            )
        return ids

    def is_too_long(self, problem: Problem) -> bool:
        """Whether ``encode`` refuses the problem."""
        return len(self.template.encode(self.tokenizer, problem.problem)) > self.max_length


def load_demonstrations(
    source: DemonstrationSource,
    encoder: PromptEncoder,
    excluded: frozenset[str],
    *,
    max_completion_length: int,
    seed: int,
) -> tuple[ExpertPool, int]:
    """Load and encode the demonstrations; also returns the number that were dropped as benchmark problems.

    Raises:
        UserError: no demonstration is left.
    """
    loaded = source.load()
    if not loaded:
        raise UserError(f"data.demonstrations: {type(source).__name__} holds none. Give it a file with at least one.")
    clean = [item for item in loaded if normalize_problem(item.problem) not in excluded]
    if not clean:
        raise UserError(f"data.demonstrations: benchmarks ask all {len(loaded)} of them. Use others.")
    pool = ExpertPool.encode(
        clean,
        encoder.template,
        encoder.tokenizer,
        max_prompt_length=encoder.max_length,
        max_completion_length=max_completion_length,
        seed=seed,
    )
    return pool, len(loaded) - len(clean)


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
    long = [problem for problem in source.problems if encoder.is_too_long(problem)]
    if long and long_problems == "error":
        encoder.encode(max(long, key=lambda problem: len(problem.problem)))
    if long:
        source.prepare(seed, excluded | {normalize_problem(problem.problem) for problem in long})
    return num_excluded, len(long)
