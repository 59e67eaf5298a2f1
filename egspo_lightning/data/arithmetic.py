"""Training data of the built-in arithmetic task: nothing to download."""

from dataclasses import dataclass, field

from egspo_lightning.arithmetic import ArithmeticTask, solve
from egspo_lightning.data.sources import DemonstrationSource, ProblemSource
from egspo_lightning.types import Demonstration, Problem

DEFAULT_TASK = ArithmeticTask()


@dataclass
class ArithmeticDemonstrations(DemonstrationSource):
    """Worked solutions of different problems of the task's train split.

    Args:
        num_demonstrations: How many; the first ones of a larger set are the smaller set.
        seed: Which ones; independent of the seed of the run.
        task: The family of problems; keep it equal to that of the problems and the benchmark.

    Raises:
        UserError: on loading, the split has fewer different problems.
    """

    num_demonstrations: int = 800
    seed: int = 0
    task: ArithmeticTask = DEFAULT_TASK

    def load(self) -> list[Demonstration]:
        """The demonstrations."""
        stream = f"demonstrations/{self.seed}"
        return [solve(p) for p in self.task.distinct(stream, "train", self.num_demonstrations)]


@dataclass
class ArithmeticProblems(ProblemSource):
    """An endless stream of draws, with replacement, from the task's train split.

    Args:
        task: The family of problems; keep it equal to that of the demonstrations and the benchmark.
    """

    task: ArithmeticTask = DEFAULT_TASK

    _stream: str | None = field(default=None, init=False, repr=False)
    _excluded: frozenset[str] = field(default=frozenset(), init=False, repr=False)

    def prepare(self, seed: int, excluded: frozenset[str]) -> int:
        """Fix the stream; count the texts kept out of it. See ``ProblemSource.prepare``."""
        self._stream = f"problems/{seed}"
        self._excluded = frozenset(text for text in excluded if self.task.contains(text, "train"))
        self.task.problem(self._stream, "train", 0, self._excluded)  # tells now where nothing is left
        return len(self._excluded)

    def draw(self, start: int, count: int) -> list[Problem]:
        """Problems of the stream, the next draw in place of an excluded one; see ``ProblemSource.draw``."""
        if self._stream is None:
            raise RuntimeError("ArithmeticProblems.draw was called before prepare")
        positions = range(start, start + count)
        return [self.task.problem(self._stream, "train", i, self._excluded) for i in positions]
