"""Training data from files, local folders and the Hugging Face Hub."""

from dataclasses import dataclass
from itertools import islice

from egspo_lightning.data.answer_formats import AnswerExtractor, SolutionFormat
from egspo_lightning.data.reader import read_rows
from egspo_lightning.data.rows import demonstration_of, problem_of
from egspo_lightning.data.sources import DemonstrationSource, FiniteProblems
from egspo_lightning.types import Demonstration, PositiveInt, Problem


@dataclass
class DatasetDemonstrations(DemonstrationSource):
    r"""Expert demonstrations from a file, a local folder or the Hugging Face Hub; a row's own ``id`` is kept.

    Args:
        path: A JSON Lines file, another file (.csv, .json, .parquet or .arrow), a pattern of files, a local folder,
            or a data set's name on the Hub ("openai/gsm8k").
        config: The data set's configuration ("main"), where it has several.
        split: The split of a data set, or a part of it ("train[:1000]").
        problem_field: The field or column that holds the question.
        solution_field: The field or column that holds the worked solution.
        answer_field: The field or column that holds the bare answer; needed only where the solution does not give it.
        solution_format: How solutions end: "boxed" (left as they are), "gsm8k" (calculator marks are removed and
            "#### 72" becomes "\\boxed{72}"), "plain" ("\\boxed{answer}" is appended), or "auto" (the first of these
            that a row allows).
        limit: Only the first rows; null for all.

    Raises:
        UserError: on loading: the data cannot be read, a column is missing, or a row is malformed or has no answer.
    """

    path: str
    config: str | None = None
    split: str = "train"
    problem_field: str = "problem"
    solution_field: str = "solution"
    answer_field: str = "answer"
    solution_format: SolutionFormat = "auto"
    limit: PositiveInt | None = None

    def load(self) -> list[Demonstration]:
        """The demonstrations, in the order of the data."""
        fields = (self.problem_field, self.solution_field, self.answer_field)
        rows = islice(read_rows(self.path, self.config, self.split, fields[:2]), self.limit)
        return [demonstration_of(row, where, *fields, self.solution_format) for where, row in rows]


@dataclass
class DatasetProblems(FiniteProblems):
    r"""Problems with gold answers from a file, a local folder or the Hugging Face Hub.

    A row's own ``id``, ``subject`` and ``level`` are kept.

    Args:
        path: A JSON Lines file, another file (.csv, .json, .parquet or .arrow), a pattern of files, a local folder,
            or a data set's name on the Hub ("openai/gsm8k").
        config: The data set's configuration ("main"), where it has several.
        split: The split of a data set, or a part of it ("train[:1000]").
        problem_field: The field or column that holds the question.
        answer_field: The field or column that holds the answer, or a solution that ends in it.
        answer_extractor: How the answer is found in that field: "none" (all of it), "boxed" (the last "\\boxed{}"),
            "gsm8k" (the text after "####"), "framebox" (the last "\\framebox{}", "\\fbox{}" or "\\boxed{}"), "bold"
            (the last bold text) or "olympiadbench" (all of it, without "$").
        limit: Only the first rows; null for all.

    Raises:
        UserError: on preparing: the data cannot be read, a column is missing, or a row is malformed or has no answer.
    """

    path: str
    config: str | None = None
    split: str = "train"
    problem_field: str = "problem"
    answer_field: str = "answer"
    answer_extractor: AnswerExtractor = "none"
    limit: PositiveInt | None = None

    def load(self) -> list[Problem]:
        """The problems, in the order of the data."""
        return self._read(needs_answer=True)

    def load_questions(self) -> list[Problem]:
        """The same; a row, or the whole data set, may have no answer."""
        return self._read(needs_answer=False)

    def _read(self, *, needs_answer: bool) -> list[Problem]:
        fields = (self.problem_field, self.answer_field)
        rows = islice(read_rows(self.path, self.config, self.split, fields[: 1 + needs_answer]), self.limit)
        return [
            problem_of(row, where, *fields, self.answer_extractor, needs_answer=needs_answer) for where, row in rows
        ]
