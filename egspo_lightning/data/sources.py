"""Interfaces of training data sources, and finite problem sources in shuffled order.

A source of your own is a subclass with ``load``::

    class MyProblems(FiniteProblems):
        def load(self) -> list[Problem]:
            return [Problem(id="1", problem="What is 6 times 7?", answer="42")]
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Generic, TypeVar

from egspo_lightning.data.answer_formats import normalize_problem
from egspo_lightning.errors import UserError
from egspo_lightning.types import Demonstration, Problem

ItemT = TypeVar("ItemT")


class EndlessOrder(Generic[ItemT]):
    """An endless order of items: each pass has each of them once, in a new order.

    The order is a pure function of the seed, so resuming is exact.
    """

    def __init__(self, items: Sequence[ItemT], seed: str) -> None:
        self.items, self.seed = items, seed
        self._pass, self._shuffled = -1, list[ItemT]()

    def draw(self, start: int, count: int) -> list[ItemT]:
        """Return the items number ``start`` to ``start + count - 1``."""
        return [self._item(position) for position in range(start, start + count)]

    def _item(self, position: int) -> ItemT:
        pass_number, place = divmod(position, len(self.items))
        if pass_number != self._pass:
            self._pass, self._shuffled = pass_number, list(self.items)
            random.Random(f"{self.seed}/{pass_number}").shuffle(self._shuffled)
        return self._shuffled[place]


class DemonstrationSource(ABC):
    """A source of expert demonstrations for SFT."""

    reward_columns: Collection[str] | None = ()
    """Names of further columns that the reward receives; None for all. Set before ``load``; a source may ignore it."""
    column_names: Collection[str] = ()
    """Names of all columns of the data, for messages. Known after ``load``."""

    @abstractmethod
    def load(self) -> list[Demonstration]:
        r"""All demonstrations, each solution ending in ``\boxed{}``, in an order that never changes."""


class ProblemSource(ABC):
    """An endless stream of problems for rollouts, in an order that is a pure function of the seed."""

    reward_columns: Collection[str] | None = ()
    """As of a ``DemonstrationSource``; set before ``prepare``."""
    column_names: Collection[str] = ()
    """As of a ``DemonstrationSource``; known after ``prepare``."""

    @abstractmethod
    def prepare(self, seed: int, excluded: frozenset[str]) -> int:
        """Fix the order, leave out the excluded problems, and return their number.

        ``excluded`` holds the texts of benchmark problems, as ``normalize_problem`` returns them.

        Raises:
            UserError: no problem is left.
        """

    @abstractmethod
    def draw(self, start: int, count: int) -> list[Problem]:
        """Problems number ``start`` to ``start + count - 1`` of the stream.

        Raises:
            RuntimeError: ``prepare`` was not called.
        """


class FiniteProblems(ProblemSource):
    """Problems that are read once and repeated: each pass has every problem once, in a new order."""

    _order = EndlessOrder[Problem]((), "")

    @abstractmethod
    def load(self) -> list[Problem]:
        """All problems, in an order that never changes."""

    def load_questions(self) -> list[Problem]:
        """All problems for ``predict``, where ``Problem.answer`` may be empty."""
        return self.load()

    def prepare(self, seed: int, excluded: frozenset[str]) -> int:
        """Load the problems and fix their order; see ``ProblemSource.prepare``."""
        loaded = self.load()
        kept = [problem for problem in loaded if normalize_problem(problem.problem) not in excluded]
        self._order = EndlessOrder(kept, str(seed))
        num_dropped = len(loaded) - len(kept)
        if not kept:
            raise UserError(
                f"{type(self).__name__} has no problem to train on: {len(loaded)} were loaded, and "
                f"{num_dropped} of them are benchmark problems. Give it other data, or remove the benchmark."
            )
        return num_dropped

    @property
    def problems(self) -> Sequence[Problem]:
        """The problems that are not excluded, in the source's order."""
        return self._order.items

    def keep(self, kept: Sequence[Problem]) -> None:
        """Reduce the problems, after ``prepare``, to some of them."""
        self._order = EndlessOrder(kept, self._order.seed)

    def draw(self, start: int, count: int) -> list[Problem]:
        """Problems of the stream; see ``ProblemSource.draw``."""
        if not self.problems:
            raise RuntimeError(f"{type(self).__name__}.draw was called before prepare")
        return self._order.draw(start, count)
