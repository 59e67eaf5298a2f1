"""Columns of a row: by name, by dotted name within nested columns, or by the usual names of problem and solution."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from egspo_lightning.errors import UserError, did_you_mean

PROBLEM = ("problem", "question", "prompt", "messages")
SOLUTION = ("solution", "completion")
ANSWER = ("answer",)
"""Names that are tried in this order where a config names no column."""


def cell(row: Mapping[str, Any], field: str) -> Any:
    """The value of a column; "reward_model.ground_truth" is the part ground_truth of the column reward_model.

    Raises:
        KeyError: the row has no such column.
    """
    if field in row:
        return row[field]
    head, dot, rest = field.partition(".")
    if dot and isinstance(row.get(head), Mapping):
        return cell(row[head], rest)
    raise KeyError(field)


def has(row: Mapping[str, Any], field: str) -> bool:
    """Whether the row has the column, whatever its value."""
    try:
        cell(row, field)
    except KeyError:
        return False
    return True


def first_of(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the names that the row has."""
    return next((name for name in names if name in row), None)


def missing(row: Mapping[str, Any], field: str, option: str, where: str, *others: str) -> UserError:
    """The error for a row without a column that the config names by ``option``.

    With ``others`` the config names none: the column has its usual name, and the others may stand for it.
    """
    names = list(_names(row))
    tried, known = f" (or {', '.join(others)})" if others else "", f"The row has the fields {', '.join(names)}"
    if not others:
        known = did_you_mean(field, names).replace("Known here:", "The row has the fields")
    return UserError(
        f"{where}: field {field!r}{tried} is missing. {known}. Correct the row, or name another field by {option}."
    )


def _names(row: Mapping[str, Any], parent: str = "") -> Iterator[str]:
    for name, value in row.items():
        yield f"{parent}{name}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{parent}{name}.")


def plain_columns(row: Mapping[str, Any], kept: Collection[str] | None, where: str) -> dict[str, Any]:
    """The columns to keep as plain values, which checkpoints can hold; None keeps all.

    Raises:
        UserError: a value is neither text, number, date nor a list or mapping of these.
    """
    names = row if kept is None else [name for name in row if name in kept]
    return {name: _plain(row[name], f"{where}: field {name!r}") for name in names}


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() and "." not in str(value) else float(value)
    if isinstance(value, date | time | timedelta):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(part, where) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, where) for part in value]
    if value is None or isinstance(value, str | int | float | bytes):
        return value
    raise UserError(
        f"{where} holds {type(value).__name__}, which a reward cannot receive: text, numbers, dates, lists and "
        "mappings are allowed. Remove the column, or let the reward name the columns that it needs."
    )
