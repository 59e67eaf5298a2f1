"""Training data of the generated tasks, without downloads."""

from dataclasses import dataclass, field

from egspo_lightning.data.sources import DemonstrationSource, ProblemSource
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.data.tasks.family import ProblemFamily, require_family
from egspo_lightning.types import Count, Demonstration, Problem

DEFAULT_TASK = ArithmeticTask()


@dataclass
class GeneratedDemonstrations(DemonstrationSource):
    """Worked solutions of different problems of the task's train split.

    Args:
        num_demonstrations: Number of demonstrations; a smaller set is the beginning of a larger one.
        seed: Seed of the choice of problems and solutions; independent of the seed of the run.
        task: The family of problems; use the same as in the problems and the benchmark.

    Raises:
        UserError: on loading, the split has fewer different problems.
    """

    num_demonstrations: Count = 800
    seed: int = 0
    task: ProblemFamily = DEFAULT_TASK

    def __post_init__(self) -> None:
        require_family(self.task, "data.demonstrations.init_args.task")

    def load(self) -> list[Demonstration]:
        """The demonstrations."""
        problems = self.task.distinct(f"demonstrations/{self.seed}", "train", self.num_demonstrations)
        return [self.task.solve(problem, self.seed) for problem in problems]


@dataclass
class GeneratedProblems(ProblemSource):
    """An endless stream of draws, with replacement, from the task's train split.

    Args:
        task: The family of problems; use the same as in the demonstrations and the benchmark.
    """

    task: ProblemFamily = DEFAULT_TASK

    _stream: str | None = field(default=None, init=False, repr=False)
    _excluded: frozenset[str] = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self) -> None:
        require_family(self.task, "data.problems.init_args.task")

    def prepare(self, seed: int, excluded: frozenset[str]) -> int:
        """Fix the stream and count the excluded problems; see ``ProblemSource.prepare``."""
        self._stream = f"problems/{seed}"
        self._excluded = frozenset(text for text in excluded if self.task.contains(text, "train"))
        self.task.problem(self._stream, "train", 0, self._excluded)  # raises now where no problem is left
        return len(self._excluded)

    def draw(self, start: int, count: int) -> list[Problem]:
        """Problems of the stream; the next draw replaces an excluded one. See ``ProblemSource.draw``."""
        if self._stream is None:
            raise RuntimeError("GeneratedProblems.draw was called before prepare")
        stream, excluded = self._stream, self._excluded
        return [self.task.problem(stream, "train", i, excluded) for i in range(start, start + count)]
