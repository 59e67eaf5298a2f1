"""Training data from the Hugging Face Hub, or from local folders in its layout."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from egspo_lightning.data.answer_formats import AnswerExtractor, SolutionFormat
from egspo_lightning.data.demonstration_rows import demonstration_of
from egspo_lightning.data.rows import Row, first, hub_rows, problem_of, question_of
from egspo_lightning.data.sources import DemonstrationSource, FiniteProblems
from egspo_lightning.types import Demonstration, Problem


@dataclass
class HubDemonstrations(DemonstrationSource):
    r"""Expert solutions from a data set of the Hugging Face Hub.

    Args:
        name: The data set ("openai/gsm8k"), a local folder of JSONL or Parquet files, or a file type ("json",
            "parquet") whose files data_files names.
        config: The data set's configuration ("main"), where it has several.
        split: The split, or a part of it ("train[:1000]").
        problem_column: The column that holds the question.
        solution_column: The column that holds the worked solution.
        answer_column: The column that holds the bare answer; null where the solution gives it.
        solution_format: How solutions end: "boxed" (left as they are), "gsm8k" (calculator marks are removed
            and "#### 72" becomes "\\boxed{72}"), "plain" ("\\boxed{answer}" is appended), or "auto": the
            first of these that a row allows.
        limit: Only the first rows; null for all.
        data_files: Paths or patterns of files, with a file type as the name.

    Raises:
        UserError: on loading: the data set cannot be loaded, lacks a column, or a row has no answer.
    """

    name: str
    config: str | None = None
    split: str = "train"
    problem_column: str = "problem"
    solution_column: str = "solution"
    answer_column: str | None = None
    solution_format: SolutionFormat = "auto"
    limit: int | None = None
    data_files: str | None = None

    def load(self) -> list[Demonstration]:
        """The demonstrations, in the order of the data set."""
        columns = (self.problem_column, self.solution_column, self.answer_column)
        named = [column for column in columns if column is not None]
        rows = first(hub_rows(self.name, self.config, self.split, named, self.data_files), self.limit)
        return [demonstration_of(row, where, *columns, self.solution_format) for where, row in rows]


@dataclass
class HubProblems(FiniteProblems):
    r"""Problems with reference answers from a data set of the Hugging Face Hub.

    Args:
        name: The data set ("openai/gsm8k"), a local folder of JSONL or Parquet files, or a file type ("json",
            "parquet") whose files data_files names.
        config: The data set's configuration ("main"), where it has several.
        split: The split, or a part of it ("train[:1000]").
        problem_column: The column that holds the question.
        answer_column: The column that holds the answer, or a solution that ends in it.
        answer_extractor: How the answer is found in that column: "none" (all of it), "boxed" (the last
            "\\boxed{}"), "gsm8k" (what follows "####") or "olympiadbench" (all of it, without "$").
        limit: Only the first rows; null for all.
        data_files: Paths or patterns of files, with a file type as the name.

    Raises:
        UserError: on preparing: the data set cannot be loaded, lacks a column, or a row has no answer.
    """

    name: str
    config: str | None = None
    split: str = "train"
    problem_column: str = "problem"
    answer_column: str = "answer"
    answer_extractor: AnswerExtractor = "none"
    limit: int | None = None
    data_files: str | None = None

    def load(self) -> list[Problem]:
        """The problems, in the order of the data set."""
        rows = self._rows([self.problem_column, self.answer_column])
        return [problem_of(row, where, *self._columns) for where, row in rows]

    def load_questions(self) -> list[Problem]:
        """The same; a row, or the whole data set, may have no answer."""
        return [question_of(row, where, *self._columns) for where, row in self._rows([self.problem_column])]

    @property
    def _columns(self) -> tuple[str, str, AnswerExtractor]:
        return self.problem_column, self.answer_column, self.answer_extractor

    def _rows(self, needed: Sequence[str]) -> Iterator[Row]:
        return first(hub_rows(self.name, self.config, self.split, needed, self.data_files), self.limit)
