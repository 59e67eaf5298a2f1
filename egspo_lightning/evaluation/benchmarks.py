"""The problems that models are measured on, and how their answers are sampled.

A benchmark of your own is a subclass with ``read``. Training sources are
another thing (``egspo_lightning.data``): no loader serves both.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

from egspo_lightning.answers import AnswerExtractor
from egspo_lightning.errors import UserError
from egspo_lightning.jsonl import read_rows
from egspo_lightning.rows import hub_rows, problem_of
from egspo_lightning.tasks.arithmetic import ArithmeticTask
from egspo_lightning.tasks.family import ProblemFamily, Split
from egspo_lightning.types import Problem


class Benchmark(ABC):
    """Problems under a name, with the sampling by which they are answered.

    Args:
        name: The name in metrics, as in "eval/NAME/avg@1"; without "/" and spaces.
        num_samples: Answers to each problem.
        temperature: Of sampling; 0 is greedy.
        top_p: The probability mass that is sampled from, in (0, 1].
        max_completion_length: Tokens of an answer at most; null for the length of the training rollouts.
        limit: Only the first problems; null for all.

    Raises:
        UserError: a value is out of range, or several samples are asked for greedily.
    """

    def __init__(
        self,
        name: str,
        *,
        num_samples: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_completion_length: int | None = None,
        limit: int | None = None,
    ) -> None:
        self.name = name
        self.num_samples = num_samples
        self.temperature = temperature
        self.top_p = top_p
        self.max_completion_length = max_completion_length
        self.limit = limit
        self._validate()

    @abstractmethod
    def read(self) -> list[Problem]:
        """All problems, in an order that never changes."""

    def load(self) -> list[Problem]:
        """The problems to answer: the first ``limit`` ones.

        Raises:
            UserError: there are none, or they cannot be read.
        """
        problems = self.read()[: self.limit]
        if not problems:
            raise UserError(f"benchmark {self.name!r} has no problems. Check its file or data set.")
        return problems

    def _validate(self) -> None:
        where = f"benchmark {self.name!r}"
        if not self.name or "/" in self.name or any(character.isspace() for character in self.name):
            raise UserError(f'{where}: name must be non-empty text without "/" and spaces; it names metrics.')
        for field in ("num_samples", "max_completion_length", "limit"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"{where}: {field} must be at least 1, got {value}.")
        if self.temperature < 0:
            raise UserError(f"{where}: temperature must be 0 (greedy) or more, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"{where}: top_p must be in (0, 1], got {self.top_p}.")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError(
                f"{where}: num_samples is {self.num_samples}, but at temperature 0 all samples are the same. "
                "Set a temperature above 0, or num_samples to 1."
            )


class GeneratedBenchmark(Benchmark):
    """Different problems of a generated task, from a split that training never sees.

    Args:
        name: The name in metrics; null for the task's own.
        split: The split; "train" tells how well the training problems are learned.
        num_problems: How many; the first ones of a larger set are the smaller set.
        seed: Which ones.
        task: The family of problems; keep it equal to that of the training data.

    Raises:
        UserError: on loading, the split has fewer different problems.
    """

    def __init__(
        self,
        name: str | None = None,
        split: Split = "test",
        num_problems: int = 512,
        seed: int = 0,
        task: ProblemFamily = ArithmeticTask(),  # noqa: B008 - frozen
        **sampling: Any,
    ) -> None:
        super().__init__(task.name if name is None else name, **sampling)
        self.split: Split = split
        self.num_problems = num_problems
        self.seed = seed
        self.task = task

    def read(self) -> list[Problem]:
        """The problems, in the order in which the seed draws them."""
        return self.task.distinct(f"benchmark/{self.seed}", self.split, self.num_problems)


class JsonlBenchmark(Benchmark):
    r"""A benchmark in a JSON Lines file; ``id``, ``subject`` and ``level`` are carried where rows have them.

    Args:
        name: The name in metrics.
        path: The file.
        problem_field: The field that holds the question.
        answer_field: The field that holds the answer, or a solution that ends in it.
        answer_extractor: How the answer is found in that field: "none" (all of it), "boxed" (the last
            "\\boxed{}") or "gsm8k" (what follows "####").

    Raises:
        UserError: on loading, naming file and line: a row is malformed or has no answer.
    """

    def __init__(
        self,
        name: str,
        path: str,
        problem_field: str = "problem",
        answer_field: str = "answer",
        answer_extractor: AnswerExtractor = "none",
        **sampling: Any,
    ) -> None:
        super().__init__(name, **sampling)
        self.path = path
        self.problem_field = problem_field
        self.answer_field = answer_field
        self.answer_extractor: AnswerExtractor = answer_extractor

    def read(self) -> list[Problem]:
        """The problems, in the order of the file."""
        fields = (self.problem_field, self.answer_field, self.answer_extractor)
        return [problem_of(row, where, *fields) for where, row in read_rows(self.path)]


class HubBenchmark(Benchmark):
    r"""A benchmark on the Hugging Face Hub, or in a local folder in its layout.

    Args:
        name: The name in metrics.
        dataset: The data set ("HuggingFaceH4/MATH-500"), or a local folder of JSONL or Parquet files.
        config: The data set's configuration ("main"), where it has several.
        split: The split, or a part of it ("test[:100]").
        problem_column: The column that holds the question.
        answer_column: The column that holds the answer, or a solution that ends in it.
        answer_extractor: How the answer is found in that column: "none" (all of it), "boxed" (the last
            "\\boxed{}") or "gsm8k" (what follows "####").

    Raises:
        UserError: on loading: the data set cannot be loaded, lacks a column, or a row has no answer.
    """

    def __init__(
        self,
        name: str,
        dataset: str,
        config: str | None = None,
        split: str = "test",
        problem_column: str = "problem",
        answer_column: str = "answer",
        answer_extractor: AnswerExtractor = "none",
        **sampling: Any,
    ) -> None:
        super().__init__(name, **sampling)
        self.dataset = dataset
        self.config = config
        self.split = split
        self.problem_column = problem_column
        self.answer_column = answer_column
        self.answer_extractor: AnswerExtractor = answer_extractor

    def read(self) -> list[Problem]:
        """The problems, in the order of the data set."""
        columns = (self.problem_column, self.answer_column)
        rows = hub_rows(self.dataset, self.config, self.split, columns)
        return [problem_of(row, where, *columns, self.answer_extractor) for where, row in rows]


class HubRecipe(NamedTuple):
    """Where a published benchmark lies, and the columns that it has there."""

    dataset: str
    config: str | None = None
    split: str = "test"
    problem_column: str = "problem"
    answer_column: str = "answer"
    answer_extractor: AnswerExtractor = "none"


KNOWN: dict[str, HubRecipe] = {
    "math500": HubRecipe("HuggingFaceH4/MATH-500"),
    "gsm8k": HubRecipe("openai/gsm8k", config="main", problem_column="question", answer_extractor="gsm8k"),
    "aime24": HubRecipe("HuggingFaceH4/aime_2024", split="train"),
    "aime25": HubRecipe("math-ai/aime25"),
    "amc23": HubRecipe("math-ai/amc23", problem_column="question"),
}
"""The benchmarks that ``KnownBenchmark`` knows by name."""


class KnownBenchmark(Benchmark):
    """A published benchmark, by the name that papers call it.

    Args:
        name: Which one; also the name in metrics.

    Raises:
        UserError: the name is not known; on loading, as ``HubBenchmark`` does.
    """

    def __init__(self, name: Literal["math500", "gsm8k", "aime24", "aime25", "amc23"], **sampling: Any) -> None:
        if name not in KNOWN:
            raise UserError(
                f"benchmark {name!r} is not known; known are {', '.join(KNOWN)}. "
                "Describe others by HubBenchmark or JsonlBenchmark."
            )
        super().__init__(name, **sampling)

    def read(self) -> list[Problem]:
        """The problems, in the order of the data set."""
        return HubBenchmark(self.name, *KNOWN[self.name]).read()
