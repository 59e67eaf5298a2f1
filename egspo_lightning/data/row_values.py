"""Question, solution and answer of a row, from the columns that hold them."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from egspo_lightning.data.answer_formats import AnswerExtractor, ending_of, extract_answer
from egspo_lightning.data.columns import ANSWER, PROBLEM, SOLUTION, cell, first_of, has, missing
from egspo_lightning.data.conversations import Conversation, is_messages, read_messages, split_turns
from egspo_lightning.errors import UserError
from egspo_lightning.types import Turn

MAX_DIGITS = 1000
"""Numbers with more digits before or after the point are refused: they are no answers."""
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']""")
"""Beginning of a list of messages that a CSV file holds as text."""


class Fields(NamedTuple):
    """The columns that a config names, dotted where they are nested; None for the usual names, see ``columns``."""

    problem: str | None = None
    answer: str | None = None
    solution: str | None = None


def conversation_of(row: dict[str, Any], where: str, problem_field: str | None) -> Conversation:
    """The question of a row, with the solution where they are turns of one conversation.

    Raises:
        UserError: the column is missing, empty or malformed.
    """
    field = _problem_column(row, where, problem_field)
    return split_turns(_turns(row, where, field, "user"), field, where)


def solved_conversation(row: dict[str, Any], where: str, fields: Fields) -> Conversation:
    """The question of a row with its solution, from one column or two.

    Raises:
        UserError: a column is missing, empty or malformed.
    """
    field = _problem_column(row, where, fields.problem)
    turns = _turns(row, where, field, "user")
    asked = split_turns(turns, field, where)
    if asked.solution is None or fields.solution not in (None, field):
        own = _solution_column(row, where, fields.solution)
        turns, field = turns + _turns(row, where, own, "assistant"), own
        asked = split_turns(turns, field, where)
    if asked.solution is None:
        raise UserError(f"{where}: field {field!r} ends in a turn of the user. A demonstration needs an answer to it.")
    return asked


def _problem_column(row: Mapping[str, Any], where: str, given: str | None) -> str:
    field = given or first_of(row, PROBLEM)
    if field is None or not has(row, field):
        raise missing(row, field or PROBLEM[0], "problem_field", where, *(() if given else PROBLEM[1:]))
    return field


def _solution_column(row: Mapping[str, Any], where: str, given: str | None) -> str:
    """The column of the solution; GSM8K has solutions in ``answer``."""
    field = given or first_of(row, SOLUTION)
    if field is None and isinstance(row.get(ANSWER[0]), str) and ending_of(row[ANSWER[0]]) != "plain":
        field = ANSWER[0]
    if field is None or not has(row, field):
        others = () if given else (*SOLUTION[1:], "a turn of the assistant in messages")
        raise missing(row, field or SOLUTION[0], "solution_field", where, *others)
    return field


def _turns(row: dict[str, Any], where: str, field: str, role: str) -> list[Turn]:
    """The turns that a column holds: those of its messages, or its text as one turn of this role."""
    value = cell(row, field)
    if isinstance(value, list | Mapping) or field == "messages" or _MESSAGES_AS_TEXT.match(str(value)):
        return read_messages(value, field, where)
    return [(role, _text(row, value, field, where))]


def gold_answer(
    row: dict[str, Any],
    where: str,
    field: str | None,
    solution: str | None,
    extractor: AnswerExtractor,
    *,
    needs_answer: bool,
) -> str:
    """The gold answer: of its column, or of the solution where the config names none and the row has none.

    Raises:
        UserError: there is no answer, unless ``needs_answer`` is false; it is empty or malformed.
    """
    own = field or first_of(row, ANSWER)
    if own is not None and has(row, own):
        if cell(row, own) is None and not needs_answer:
            return ""
        return extract_answer(_answer(row, own, where), extractor, where)
    column = first_of(row, SOLUTION)
    if field is None and solution is None and column is not None:
        solution = _turns(row, where, column, "assistant")[-1][1]
    if field is None and solution is not None and (extractor != "auto" or ending_of(solution) != "plain"):
        return extract_answer(solution, extractor, where)
    if not needs_answer:
        return ""
    others = () if field else ("an answer in \\boxed{} or behind #### in a solution",)
    raise missing(row, field or ANSWER[0], "answer_field", where, *others)


def appended_answer(row: dict[str, Any], where: str, fields: Fields) -> str | None:
    """The answer to append to a solution that does not give it; None where the row has none.

    Raises:
        UserError: the config names a column that is missing, or the answer is malformed.
    """
    field = fields.answer or ANSWER[0]
    if fields.answer is not None and not has(row, field):
        raise missing(row, field, "answer_field", where)
    value = cell(row, field) if has(row, field) and field != (fields.solution or "") else None
    return _answer(row, field, where) if value is not None and str(value).strip() else None


def _answer(row: dict[str, Any], field: str, where: str) -> str:
    """The text of an answer column.

    The parts of a list, as OlympiadBench has them, are joined by commas; of messages, the last is taken.
    """
    value = cell(row, field)
    if is_messages(value):
        return read_messages(value, field, where)[-1][1]
    parts = value if isinstance(value, list) and value else [value]
    return ", ".join(_text(row, part, field, where) for part in parts)


def _text(row: Mapping[str, Any], value: Any, field: str, where: str) -> str:
    """The text of a value; a finite number is written in digits (0.00005, never 5e-05)."""
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        number = Decimal(str(value))
        value = f"{number:f}" if number.is_finite() and abs(number.adjusted()) < MAX_DIGITS else value
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{where}: field {field!r} must be non-empty text, got {value!r}. The row has the fields {', '.join(row)}."
        )
    return value
