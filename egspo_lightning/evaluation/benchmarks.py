"""The problems that models are measured on, and how their answers are sampled.

A benchmark of your own is a subclass with ``read``. Training sources are
another thing (``egspo_lightning.data``): no loader serves both.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal

from egspo_lightning.data.answer_formats import AnswerExtractor
from egspo_lightning.data.json_lines import read_rows
from egspo_lightning.data.rows import hub_rows, problem_of
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.data.tasks.family import ProblemFamily, Split, require_family
from egspo_lightning.errors import UserError, require
from egspo_lightning.evaluation.answer_sampling import GREEDY, AnswerSampling
from egspo_lightning.evaluation.benchmark_recipes import KNOWN, Recipe
from egspo_lightning.evaluation.problem_batches import require_different_ids
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
        num_samples: int = GREEDY.num_samples,
        temperature: float = GREEDY.temperature,
        top_p: float = GREEDY.top_p,
        max_completion_length: int | None = GREEDY.max_completion_length,
        limit: int | None = None,
    ) -> None:
        where = f"benchmark {name!r}:"
        named = bool(name) and "/" not in name and not any(character.isspace() for character in name)
        require(named, f"{where} name", repr(name), 'non-empty text without "/" and spaces; it names metrics and files')
        require(limit is None or limit >= 1, f"{where} limit", limit, "at least 1, or null for all")
        self.name, self.limit = name, limit
        self.sampling = AnswerSampling(num_samples, temperature, top_p, max_completion_length)
        self.sampling.require_sense(where)

    @property
    def num_samples(self) -> int:
        """Answers to each problem."""
        return self.sampling.num_samples

    @abstractmethod
    def read(self) -> list[Problem]:
        """All problems, in an order that never changes."""

    def load(self) -> list[Problem]:
        """The problems to answer: the first ``limit`` ones.

        Raises:
            UserError: there are none, they cannot be read, or two have the same id.
        """
        problems = self.read()[: self.limit]
        if not problems:
            raise UserError(f"benchmark {self.name!r} has no problems. Check its file or data set.")
        require_different_ids(problems, f"benchmark {self.name!r}")
        return problems


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
        require_family(task, "data.benchmarks.init_args.task")
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
            "\\boxed{}"), "gsm8k" (what follows "####") or "olympiadbench" (all of it, without "$").

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
            "\\boxed{}"), "gsm8k" (what follows "####") or "olympiadbench" (all of it, without "$").

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


class KnownBenchmark(Benchmark):
    """A published benchmark, by the name that papers call it, with the sampling that they use (see ``recipes``).

    Args:
        name: Which one; also the name in metrics.
        path: A JSON Lines file with the same problems instead of the Hugging Face Hub; its fields are "problem" and
            "answer", or the Hub's columns.
        num_samples: Answers to each problem; null for as many as the field draws.
        temperature: Of sampling; 0 is greedy; null for the field's.
        top_p: The probability mass that is sampled from, in (0, 1]; null for the field's.
        max_completion_length: Tokens of an answer at most; null for the field's.
        limit: Only the first problems; null for all.

    Raises:
        UserError: the name is not known; on loading, as ``HubBenchmark`` and ``JsonlBenchmark`` do.
    """

    def __init__(
        self,
        name: Literal["math500", "gsm8k", "minerva", "olympiadbench", "aime24", "aime25", "amc23"],
        path: str | None = None,
        *,
        num_samples: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_completion_length: int | None = None,
        limit: int | None = None,
    ) -> None:
        if name not in KNOWN:
            raise UserError(
                f"benchmark {name!r} is not known; known are {', '.join(KNOWN)}. "
                "Describe others by HubBenchmark or JsonlBenchmark."
            )
        usual = KNOWN[name].sampling
        super().__init__(
            name,
            num_samples=usual.num_samples if num_samples is None else num_samples,
            temperature=usual.temperature if temperature is None else temperature,
            top_p=usual.top_p if top_p is None else top_p,
            max_completion_length=(
                usual.max_completion_length if max_completion_length is None else max_completion_length
            ),
            limit=limit,
        )
        self.path = path

    def read(self) -> list[Problem]:
        """The problems, in the order of the data set or file."""
        recipe = KNOWN[self.name]
        columns = (recipe.problem_column, recipe.answer_column, recipe.answer_extractor)
        if self.path is None:
            return HubBenchmark(self.name, recipe.dataset, recipe.config, recipe.split, *columns).read()
        return [problem_of(row, where, *_fields(row, recipe)) for where, row in read_rows(self.path)]


def _fields(row: dict[str, Any], recipe: Recipe) -> tuple[str, str, AnswerExtractor]:
    """Where a row of a local file has problem and answer: in the Hub's columns, or in fields called so."""
    if recipe.problem_column in row and recipe.answer_column in row:
        return recipe.problem_column, recipe.answer_column, recipe.answer_extractor
    return "problem", "answer", recipe.local_extractor
