"""Base class of generated tasks: splits, endless streams and sets of different problems.

A task of your own is a frozen dataclass that inherits from ``ProblemFamily``; its fields are the settings.
"""

import random
from abc import ABC, abstractmethod
from hashlib import blake2b
from typing import ClassVar, Literal

from egspo_lightning.errors import UserError
from egspo_lightning.types import Demonstration, Problem

Split = Literal["train", "validation", "test"]
SPLITS: dict[Split, range] = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}
"""The hash buckets, of ten, that each split holds."""

_MAX_ATTEMPTS = 10_000


class ProblemFamily(ABC):
    """Problems generated from a seed. A hash of its key assigns each problem to one split, whatever the seed.

    All methods are pure functions of the settings and their arguments.
    """

    name: ClassVar[str]
    """Begins the ids of the problems and names the benchmark."""

    @abstractmethod
    def draw(self, rng: random.Random) -> str:
        """Draw the text of a candidate; a candidate without a key is dropped, and the next one is drawn."""

    @abstractmethod
    def key(self, text: str) -> str | None:
        """Key that decides the split: equal for problems that only differ in writing; None outside of the family."""

    @abstractmethod
    def answer(self, text: str) -> str:
        """The answer of a problem of the family."""

    @abstractmethod
    def solve(self, problem: Problem, seed: int | str = 0) -> Demonstration:
        r"""A worked solution that ends in ``\boxed{}``; the seed chooses one where there are several."""

    def problem(self, seed: int | str, split: Split, index: int, excluded: frozenset[str] = frozenset()) -> Problem:
        """Problem number ``index`` of an endless stream of draws with replacement.

        ``excluded`` holds problem texts to leave out; the next draw replaces an excluded problem.

        Raises:
            UserError: all or nearly all problems of the split are excluded.
        """
        rng = random.Random(f"{seed}/{split}/{index}")
        for _ in range(_MAX_ATTEMPTS):
            text = self.draw(rng)
            if self.contains(text, split) and text not in excluded:
                return Problem(f"{self.name}/{text.removesuffix('=?')}", text, self.answer(text))
        raise UserError(
            f"No problem for split {split!r} in {_MAX_ATTEMPTS} draws of {self!r} with {len(excluded)} excluded "
            "problems. Choose settings that allow more problems."
        )

    def distinct(self, seed: int | str, split: Split, count: int) -> list[Problem]:
        """The first ``count`` problems of the stream with different texts; a smaller set is a prefix of a larger one.

        Raises:
            UserError: the split has fewer different problems.
        """
        found: dict[str, Problem] = {}
        num_draws = 20 * count + 1000  # enough to find all problems of the split where all are asked for
        for index in range(num_draws):
            problem = self.problem(seed, split, index)
            found.setdefault(problem.problem, problem)
            if len(found) == count:
                return list(found.values())
        raise UserError(
            f"{count} different problems of split {split!r} are asked for, but only {len(found)} came up in "
            f"{num_draws} draws of {self!r}. Ask for fewer, or choose settings that allow more."
        )

    def contains(self, text: str, split: Split) -> bool:
        """Whether ``text`` is a problem of this family and split."""
        key = self.key(text)
        if key is None:
            return False
        digest = blake2b(key.encode(), digest_size=4).digest()
        return int.from_bytes(digest) % 10 in SPLITS[split]


def require_family(task: object, field: str) -> None:
    """Refuse a task that is not a family of problems, such as null, which the parser accepts.

    Raises:
        UserError: it is not a family.
    """
    if not isinstance(task, ProblemFamily):
        raise UserError(
            f"{field} must be a family of problems, such as ArithmeticTask, got "
            f"{'null' if task is None else task}. Leave it out for the default."
        )
