"""Conversion of a row into a problem or a demonstration."""

import math
from typing import Any

from egspo_lightning.data.answer_formats import AnswerExtractor, SolutionFormat, boxed_solution, extract_answer
from egspo_lightning.errors import UserError
from egspo_lightning.types import Demonstration, Problem


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
