"""Rows of Hugging Face data sets, and what every reader of rows needs: a limit, an id, a problem."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from egspo_lightning.data.answer_formats import AnswerExtractor, extract_answer
from egspo_lightning.data.json_lines import text_field
from egspo_lightning.errors import UserError
from egspo_lightning.types import Problem

Row = tuple[str, dict[str, Any]]
"""Where the row stands ("data/train.jsonl:12", "openai/gsm8k:train:11"), for errors, and its fields."""


def hub_rows(
    name: str, config: str | None, split: str, columns: Iterable[str], data_files: str | None = None
) -> Iterator[Row]:
    """Yield ``("NAME:SPLIT:NUMBER", row)`` for each row, counted from 0 as the Hub's viewer does.

    ``name`` is one of the Hub, a local folder, or a file type ("json", "parquet") with ``data_files``.

    Raises:
        UserError: the data set cannot be loaded, or lacks one of the columns.
    """
    import datasets

    try:
        table = datasets.load_dataset(name, config, split=split, data_files=data_files)
    except Exception as error:  # the library lets through whatever its file systems and HTTP clients raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data set {name!r} (config {config!r}, split {split!r}) could not be loaded: {reason} "
            "Check its name, config and split. Without a network, download it beforehand, or give as the "
            "name the path of a local folder of JSONL or Parquet files."
        ) from error
    if missing := [column for column in columns if column not in table.column_names]:
        raise UserError(
            f"data set {name!r} (split {split!r}) has no column {', '.join(map(repr, missing))}. "
            f"Its columns are {', '.join(table.column_names)}."
        )
    for number, row in enumerate(table):
        yield f"{name}:{split}:{number}", row


def first(rows: Iterable[Row], limit: int | None) -> Iterator[Row]:
    """The first ``limit`` rows, or all where it is None.

    Raises:
        UserError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, or null for all rows, got {limit}.")
    return islice(rows, limit)


def row_id(row: dict[str, Any], where: str) -> str:
    """The row's own ``id`` or ``unique_id``; without one, its place without the folder: "train.jsonl:12"."""
    for field in ("id", "unique_id"):
        if row.get(field) not in (None, ""):
            return str(row[field])
    return where.replace("\\", "/").rpartition("/")[2]


def problem_of(
    row: dict[str, Any], where: str, problem_field: str, answer_field: str, answer_extractor: AnswerExtractor
) -> Problem:
    """The problem that a row holds; its subject ("subfield", "subject") and ``level`` are carried where it has them.

    Raises:
        UserError: the problem or its answer is absent or empty.
    """
    answer = extract_answer(_answer_field(row, answer_field, where), answer_extractor, where)
    return _problem(row, where, problem_field, answer)


def question_of(
    row: dict[str, Any], where: str, problem_field: str, answer_field: str, answer_extractor: AnswerExtractor
) -> Problem:
    """The problem that a row holds, also where it has no answer: ``Problem.answer`` is empty then.

    Raises:
        UserError: the problem is absent or empty, or an answer is there and cannot be found in its field.
    """
    if row.get(answer_field) is None:
        return _problem(row, where, problem_field, answer="")
    return problem_of(row, where, problem_field, answer_field, answer_extractor)


def _problem(row: dict[str, Any], where: str, problem_field: str, answer: str) -> Problem:
    return Problem(
        id=row_id(row, where),
        problem=text_field(row, problem_field, where),
        answer=answer,
        subject=str(row.get("subfield") or row.get("subject") or ""),  # OlympiadBench has both, and one subject
        level=str(row.get("level") or ""),
    )


def _answer_field(row: dict[str, Any], field: str, where: str) -> str:
    """The text of a field; of a list of texts, all of them: OlympiadBench keeps the parts of an answer so."""
    value = row.get(field)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        row = row | {field: ", ".join(value)}
    return text_field(row, field, where)
