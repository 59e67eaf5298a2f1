"""Training data from JSON Lines files: one JSON object a line."""

from collections.abc import Iterator
from dataclasses import dataclass

from egspo_lightning.data.answer_formats import AnswerExtractor, SolutionFormat
from egspo_lightning.data.demonstration_rows import demonstration_of
from egspo_lightning.data.json_lines import read_rows
from egspo_lightning.data.rows import Row, first, problem_of, question_of
from egspo_lightning.data.sources import DemonstrationSource, FiniteProblems
from egspo_lightning.types import Demonstration, Problem


@dataclass
class JsonlDemonstrations(DemonstrationSource):
    r"""Expert solutions from a JSON Lines file; ``id`` is used where a row has one.

    Args:
        path: The file.
        problem_field: The field that holds the question.
        solution_field: The field that holds the worked solution.
        answer_field: The field that holds the bare answer; needed only where the solution does not give it.
        solution_format: How solutions end: "boxed" (left as they are), "gsm8k" (calculator marks are removed
            and "#### 72" becomes "\\boxed{72}"), "plain" ("\\boxed{answer}" is appended), or "auto": the
            first of these that a row allows.
        limit: Only the first rows; null for all.

    Raises:
        UserError: on loading, naming file and line: a row is malformed or its answer cannot be found.
    """

    path: str
    problem_field: str = "problem"
    solution_field: str = "solution"
    answer_field: str = "answer"
    solution_format: SolutionFormat = "auto"
    limit: int | None = None

    def load(self) -> list[Demonstration]:
        """The demonstrations, in the order of the file."""
        fields = (self.problem_field, self.solution_field, self.answer_field)
        rows = first(read_rows(self.path), self.limit)
        return [demonstration_of(row, where, *fields, self.solution_format) for where, row in rows]


@dataclass
class JsonlProblems(FiniteProblems):
    r"""Problems with reference answers from a JSON Lines file; ``id``, ``subject`` and ``level`` are carried.

    Args:
        path: The file.
        problem_field: The field that holds the question.
        answer_field: The field that holds the answer, or a solution that ends in it.
        answer_extractor: How the answer is found in that field: "none" (all of it), "boxed" (the last
            "\\boxed{}"), "gsm8k" (what follows "####") or "olympiadbench" (all of it, without "$").
        limit: Only the first rows; null for all.

    Raises:
        UserError: on preparing, naming file and line: a row is malformed or has no answer.
    """

    path: str
    problem_field: str = "problem"
    answer_field: str = "answer"
    answer_extractor: AnswerExtractor = "none"
    limit: int | None = None

    def load(self) -> list[Problem]:
        """The problems, in the order of the file."""
        return [problem_of(row, where, *self._fields) for where, row in self._rows()]

    def load_questions(self) -> list[Problem]:
        """The same; a row may have no answer."""
        return [question_of(row, where, *self._fields) for where, row in self._rows()]

    @property
    def _fields(self) -> tuple[str, str, AnswerExtractor]:
        return self.problem_field, self.answer_field, self.answer_extractor

    def _rows(self) -> Iterator[Row]:
        return first(read_rows(self.path), self.limit)
