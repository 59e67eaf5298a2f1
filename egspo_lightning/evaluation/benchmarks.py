"""Benchmarks: held-out problems with a name and the sampling of their answers.

A benchmark of your own is a subclass with ``read``. Benchmarks and training sources (``egspo_lightning.data``) are
different classes, so a config cannot train on a benchmark by mistake.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from egspo_lightning.data.answer_formats import AnswerExtractor
from egspo_lightning.data.reader import read_rows
from egspo_lightning.data.row_values import Fields
from egspo_lightning.data.rows import ProblemRows, problem_of
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.data.tasks.family import ProblemFamily, Split, require_family
from egspo_lightning.errors import UserError, require
from egspo_lightning.evaluation.answers import GREEDY, AnswerSampling
from egspo_lightning.evaluation.benchmark_recipes import KNOWN, Recipe
from egspo_lightning.rewards.grading import Extraction
from egspo_lightning.types import Count, NonNegativeFloat, PositiveInt, PositiveShare, Problem


class Benchmark(ABC):
    """Problems under a name, with the sampling of their answers.

    Args:
        name: The name in metrics, as in "eval/NAME/avg@1"; without "/" and spaces.
        num_samples: Answers sampled for each problem.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Sample from the smallest set of tokens with this probability mass, in (0, 1].
        max_completion_length: Longest answer in tokens; null for the length of the training rollouts.
        limit: Only the first problems; null for all.
        extraction: Where an answer is found: "boxed" or "lenient" (free text, too); null for the evaluation grader's.

    Raises:
        UserError: the name is empty or has "/" or spaces, or several samples are asked for at temperature 0.
    """

    def __init__(
        self,
        name: str,
        *,
        num_samples: PositiveInt = GREEDY.num_samples,
        temperature: NonNegativeFloat = GREEDY.temperature,
        top_p: PositiveShare = GREEDY.top_p,
        max_completion_length: PositiveInt | None = GREEDY.max_completion_length,
        limit: PositiveInt | None = None,
        extraction: Extraction | None = None,
    ) -> None:
        where, allowed = f"benchmark {name!r}:", 'non-empty text without "/" and spaces; it names metrics and files'
        require(bool(re.fullmatch(r"[^\s/]+", name)), f"{where} name", repr(name), allowed)
        self.name, self.num_samples, self.limit, self.extraction = name, int(num_samples), limit, extraction
        self.sampling = AnswerSampling(num_samples, temperature, top_p, max_completion_length)
        self.sampling.require_different_samples(where)

    @abstractmethod
    def read(self) -> list[Problem]:
        """All problems, in an order that never changes."""

    def load(self) -> list[Problem]:
        """Return the problems to answer: the first ``limit`` of them.

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
        split: The split; "train" measures how well the training problems are learned.
        num_problems: Number of problems; a smaller set is the beginning of a larger one.
        seed: Seed of the choice of problems.
        task: The family of problems; use the same as in the training data.

    Raises:
        UserError: on loading, the split has fewer different problems.
    """

    def __init__(
        self,
        name: str | None = None,
        split: Split = "test",
        num_problems: Count = 512,
        seed: int = 0,
        task: ProblemFamily = ArithmeticTask(),  # noqa: B008 - frozen
        **sampling: Any,
    ) -> None:
        require_family(task, "data.benchmarks.init_args.task")
        super().__init__(task.name if name is None else name, **sampling)
        self.split, self.num_problems, self.seed, self.task = split, num_problems, seed, task

    def read(self) -> list[Problem]:
        """The problems, in the order in which the seed draws them."""
        return self.task.distinct(f"benchmark/{self.seed}", self.split, self.num_problems)


class DatasetBenchmark(Benchmark, ProblemRows):
    """A benchmark from a file, a local folder or the Hugging Face Hub.

    Args:
        split: The split of a data set, or a part of it ("test[:100]").
    """

    def __init__(
        self,
        name: str,
        path: str,
        config: str | None = None,
        split: str = "test",
        problem_field: str | None = None,
        answer_field: str | None = None,
        answer_extractor: AnswerExtractor = "auto",
        **sampling: Any,
    ) -> None:
        super().__init__(name, **sampling)
        ProblemRows.__init__(self, path, config, split, problem_field, answer_field, self.limit, answer_extractor)

    def read(self) -> list[Problem]:
        """The problems, in the order of the data."""
        return self.read_problems()


class KnownBenchmark(Benchmark):
    """A published benchmark under the name that papers use, with its usual sampling (see ``benchmark_recipes``).

    Args:
        name: The benchmark's name; also the name in metrics.
        path: A local file or folder with the same problems; null reads the Hugging Face Hub. Its fields are "problem"
            and "answer", or the columns of the Hub.
        num_samples: Answers sampled for each problem; null for the usual number.
        temperature: Sampling temperature; 0 is greedy; null for the usual value.
        top_p: Sample from the smallest set of tokens with this probability mass; null for the usual value.
        max_completion_length: Longest answer in tokens; null for the usual length.

    Raises:
        UserError: on loading, as ``DatasetBenchmark`` does.
    """

    def __init__(
        self,
        name: Literal["math500", "gsm8k", "minerva", "olympiadbench", "aime24", "aime25", "amc23"],
        path: str | None = None,
        *,
        num_samples: PositiveInt | None = None,
        temperature: NonNegativeFloat | None = None,
        top_p: PositiveShare | None = None,
        max_completion_length: PositiveInt | None = None,
        limit: PositiveInt | None = None,
    ) -> None:
        usual, given = asdict(KNOWN[name].sampling), (num_samples, temperature, top_p, max_completion_length)
        chosen: dict[str, Any] = {k: usual[k] if v is None else v for k, v in zip(usual, given, strict=True)}
        super().__init__(name, **chosen, limit=limit)
        self.path = path

    def read(self) -> list[Problem]:
        """The problems, in the order of the data."""
        recipe = KNOWN[self.name]
        rows = read_rows(self.path or recipe.rows.path, recipe.rows.config, recipe.rows.split)
        return [problem_of(row, where, *_fields(row, recipe)) for where, row in rows]


def _fields(row: dict[str, Any], recipe: Recipe) -> tuple[Fields, AnswerExtractor]:
    """The fields of problem and answer in a row: the columns of the Hub, or "problem" and "answer"."""
    hub = Fields(recipe.rows.problem_field or "problem", recipe.rows.answer_field or "answer")
    if hub.problem in row and hub.answer in row:
        return hub, recipe.rows.answer_extractor
    return Fields("problem", "answer"), recipe.local_extractor


def require_different_ids(problems: Sequence[Problem], where: str) -> None:
    """Refuse problems with equal ids, which name their random streams and their answers in files.

    Raises:
        UserError: two problems have the same id.
    """
    ((most, count),) = Counter(problem.id for problem in problems).most_common(1)
    if count > 1:
        raise UserError(f"{where}: {count} problems have the id {most!r}. Give each an id of its own.")
