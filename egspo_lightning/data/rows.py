"""Rows of a data set, and their conversion into problems and demonstrations."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any

from egspo_lightning.data.answer_formats import (
    AnswerExtractor,
    SolutionFormat,
    boxed_solution,
    ending_of,
    extract_answer,
)
from egspo_lightning.data.reader import Row, read_rows
from egspo_lightning.errors import UserError
from egspo_lightning.types import Demonstration, PositiveInt, Problem

MAX_DIGITS = 1000
"""Numbers with more digits before or after the point are refused: they are no answers."""


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
    is_open = row.get(answer_field) is None and not needs_answer
    return Problem(
        id=_row_id(row, where),
        problem=_text(row, problem_field, where),
        answer="" if is_open else extract_answer(_answer(row, answer_field, where), answer_extractor, where),
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
    if solution_format == "auto":
        solution_format = ending_of(solution)
    answer = None if answer_field == solution_field or solution_format != "plain" else row.get(answer_field)
    if answer is not None and str(answer).strip():
        answer = _answer(row, answer_field, where)
    return Demonstration(_row_id(row, where), problem, boxed_solution(solution, answer, solution_format, where))


def _row_id(row: dict[str, Any], where: str) -> str:
    """The row's own ``id`` or ``unique_id``; without one, its place without the folder: "train.jsonl:12"."""
    for field in ("id", "unique_id"):
        if row.get(field) not in (None, ""):
            return str(row[field])
    return where.replace("\\", "/").rpartition("/")[2]


def _answer(row: dict[str, Any], field: str, where: str) -> str:
    """The text of an answer field; the parts of a list, as OlympiadBench has them, are joined by commas."""
    value = row.get(field)
    rows = [row | {field: part} for part in value] if isinstance(value, list) and value else [row]
    return ", ".join(_text(each, field, where) for each in rows)


def _text(row: dict[str, Any], field: str, where: str) -> str:
    """The text of a field; a finite number is written in digits (0.00005, never 5e-05)."""
    value = row.get(field)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        number = Decimal(str(value))
        value = f"{number:f}" if number.is_finite() and abs(number.adjusted()) < MAX_DIGITS else value
    if not isinstance(value, str) or not value.strip():
        shown = "nothing" if field not in row else repr(value)
        raise UserError(
            f"{where}: field {field!r} must be non-empty text, got {shown}. The row has the fields {', '.join(row)}."
        )
    return value
