"""Rows of a data set, and their conversion into problems and demonstrations."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from egspo_lightning.data.answer_formats import AnswerExtractor, SolutionFormat, boxed_solution, extract_answer
from egspo_lightning.data.reader import Row, read_rows
from egspo_lightning.errors import UserError
from egspo_lightning.types import Demonstration, PositiveInt, Problem


@dataclass
class DatasetRows:
    """Rows of a file, a local folder or the Hugging Face Hub.

    Args:
        path: A JSON Lines file, another file (.csv, .json, .parquet or .arrow), a pattern of files, a local folder,
            or a data set's name on the Hub ("openai/gsm8k").
        config: The data set's configuration ("main"), where it has several.
        split: The split of a data set, or a part of it ("train[:1000]").
        problem_field: The field or column that holds the question.
        answer_field: The field or column that holds the answer, or a solution that ends in it.
        limit: Only the first rows; null for all.

    Raises:
        UserError: on loading: the data cannot be read, a column is missing, or a row is malformed or has no answer.
    """

    path: str
    config: str | None = None
    split: str = "train"
    problem_field: str = "problem"
    answer_field: str = "answer"
    limit: PositiveInt | None = None

    def rows(self, columns: Collection[str]) -> Iterable[Row]:
        """The rows with their places, see ``read_rows``; a data set must have these columns."""
        return islice(read_rows(self.path, self.config, self.split, columns), self.limit)


@dataclass
class ProblemRows(DatasetRows):
    r"""Problems from a file, a local folder or the Hugging Face Hub; a row's ``id``, ``subject``, ``level`` are kept.

    Args:
        answer_extractor: How the answer is found in its field: "none" (all of it), "boxed" (the last "\boxed{}"),
            "gsm8k" (the text after "####"), "framebox" (the last "\framebox{}", "\fbox{}" or "\boxed{}"), "bold"
            (the last bold text) or "olympiadbench" (all of it, without "$").
    """

    answer_extractor: AnswerExtractor = "none"

    def read_problems(self, *, needs_answer: bool = True) -> list[Problem]:
        """The problems, in the order of the data; a row may lack the answer unless ``needs_answer``."""
        fields = (self.problem_field, self.answer_field)
        rows = self.rows(fields[: 1 + needs_answer])
        return [
            problem_of(row, where, *fields, self.answer_extractor, needs_answer=needs_answer) for where, row in rows
        ]


def problem_of(
    row: dict[str, Any],
    where: str,
    problem_field: str,
    answer_field: str,
    answer_extractor: AnswerExtractor,
    *,
    needs_answer: bool = True,
) -> Problem:
    """Convert a row into a problem, with its ``level`` and its subject ("subfield" or "subject") where it has them.

    Raises:
        UserError: the problem is absent or empty, or the answer is, unless ``needs_answer`` is false and the row has
            none.
    """
    answer = row.get(answer_field)
    if isinstance(answer, list) and answer and all(isinstance(part, str) for part in answer):
        row = row | {answer_field: ", ".join(answer)}  # OlympiadBench lists the parts of an answer
    is_open = answer is None and not needs_answer
    return Problem(
        id=_row_id(row, where),
        problem=_text(row, problem_field, where),
        answer="" if is_open else extract_answer(_text(row, answer_field, where), answer_extractor, where),
        subject=str(row.get("subfield") or row.get("subject") or ""),  # OlympiadBench has both, and one subject
        level=str(row.get("level") or ""),
    )


def demonstration_of(
    row: dict[str, Any],
    where: str,
    problem_field: str,
    solution_field: str,
    answer_field: str,
    solution_format: SolutionFormat,
) -> Demonstration:
    r"""Convert a row into a demonstration whose solution ends in ``\boxed{}``.

    Raises:
        UserError: the problem or the solution is absent or empty, or no answer can be found.
    """
    problem, solution = _text(row, problem_field, where), _text(row, solution_field, where)
    answer = None if answer_field == solution_field else row.get(answer_field)
    given = None if answer is None else str(answer)
    return Demonstration(_row_id(row, where), problem, boxed_solution(solution, given, solution_format, where))


def _row_id(row: dict[str, Any], where: str) -> str:
    """The row's own ``id`` or ``unique_id``; without one, its place without the folder: "train.jsonl:12"."""
    for field in ("id", "unique_id"):
        if row.get(field) not in (None, ""):
            return str(row[field])
    return where.replace("\\", "/").rpartition("/")[2]


def _text(row: dict[str, Any], field: str, where: str) -> str:
    """The text of a field; a finite number becomes its text."""
    value = row.get(field)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        shown = "nothing" if field not in row else repr(value)
        raise UserError(
            f"{where}: field {field!r} must be non-empty text, got {shown}. The row has the fields {', '.join(row)}."
        )
    return value
