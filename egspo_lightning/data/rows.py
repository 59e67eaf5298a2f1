"""Rows of a data set, and their conversion into problems and demonstrations."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from egspo_lightning.data.answer_formats import AnswerExtractor, SolutionFormat, boxed_solution, ending_of
from egspo_lightning.data.columns import plain_columns
from egspo_lightning.data.reader import Row, read_rows
from egspo_lightning.data.row_values import Fields, appended_answer, conversation_of, gold_answer, solved_conversation
from egspo_lightning.types import Demonstration, PositiveInt, Problem


@dataclass
class DatasetRows:
    """Rows of a file, a local folder or the Hugging Face Hub.

    Args:
        path: A JSON Lines file, another file (.csv, .json, .parquet or .arrow), a pattern of files, a local folder,
            or a data set's name on the Hub ("openai/gsm8k").
        config: The data set's configuration ("main"), where it has several.
        split: The split of a data set, or a part of it ("train[:1000]").
        problem_field: The column that holds the question, as text or as a list of messages; dotted where it is nested.
            null for the first of problem, question, prompt and messages.
        answer_field: The column that holds the answer ("reward_model.ground_truth"), or a solution that ends in it.
            null for answer, or for the answer in the solution.
        limit: Only the first rows; null for all.

    Raises:
        UserError: on loading: the data cannot be read, a column is missing, or a row is malformed or has no answer.
    """

    path: str
    config: str | None = None
    split: str = "train"
    problem_field: str | None = None
    answer_field: str | None = None
    limit: PositiveInt | None = None

    def rows(self) -> Iterator[Row]:
        """The rows with their places, see ``read_rows``."""
        names = dict[str, None]()
        for where, row in islice(read_rows(self.path, self.config, self.split), self.limit):
            names.update(dict.fromkeys(row))
            yield where, row
        self.column_names: Collection[str] = names


@dataclass
class ProblemRows(DatasetRows):
    r"""Problems from a file, a local folder or the Hugging Face Hub; a row's ``id``, ``subject``, ``level`` are kept.

    Args:
        answer_extractor: How the answer is found in its field: "auto" (the last "\boxed{}", else the text after "####",
            else all of it), "none" (all of it), "boxed", "gsm8k" (the text after "####"), "framebox" (the last
            "\framebox{}", "\fbox{}" or "\boxed{}"), "bold" (the last bold text) or "olympiadbench" (all of it, without
            "$").
    """

    answer_extractor: AnswerExtractor = "auto"

    def read_problems(self, *, needs_answer: bool = True, columns: Collection[str] | None = ()) -> list[Problem]:
        """The problems, in the order of the data.

        Args:
            needs_answer: whether a row without an answer is refused
            columns: names of the further columns to keep; None keeps all
        """
        fields = Fields(self.problem_field, self.answer_field)
        return [
            problem_of(row, where, fields, self.answer_extractor, needs_answer=needs_answer, columns=columns)
            for where, row in self.rows()
        ]


def problem_of(
    row: dict[str, Any],
    where: str,
    fields: Fields,
    answer_extractor: AnswerExtractor,
    *,
    needs_answer: bool = True,
    columns: Collection[str] | None = (),
) -> Problem:
    """Convert a row into a problem, with its ``level`` and its subject ("subfield" or "subject") where it has them.

    Raises:
        UserError: the problem is absent or malformed, or the answer is, unless ``needs_answer`` is false and the row
            has none.
    """
    asked = conversation_of(row, where, fields.problem)
    return Problem(
        id=_row_id(row, where),
        problem=asked.problem,
        answer=gold_answer(row, where, fields.answer, asked.solution, answer_extractor, needs_answer=needs_answer),
        subject=str(row.get("subfield") or row.get("subject") or ""),  # OlympiadBench has both, and one subject
        level=str(row.get("level") or ""),
        context=asked.context,
        columns=plain_columns(row, columns, where) or None,
    )


def demonstration_of(
    row: dict[str, Any],
    where: str,
    fields: Fields,
    solution_format: SolutionFormat,
    columns: Collection[str] | None = (),
) -> Demonstration:
    r"""Convert a row into a demonstration whose solution ends in ``\boxed{}``.

    Raises:
        UserError: the problem or the solution is absent or malformed, or no answer can be found.
    """
    asked = solved_conversation(row, where, fields)
    solution = asked.solution or ""
    if solution_format == "auto":
        solution_format = ending_of(solution)
    answer = appended_answer(row, where, fields) if solution_format == "plain" else None
    solution = boxed_solution(solution, answer, solution_format, where)
    kept = plain_columns(row, columns, where) or None
    return Demonstration(_row_id(row, where), asked.problem, solution, asked.context, kept)


def _row_id(row: dict[str, Any], where: str) -> str:
    """The row's own ``id`` or ``unique_id``; without one, its place without the folder: "train.jsonl:12"."""
    for field in ("id", "unique_id"):
        if row.get(field) not in (None, ""):
            return str(row[field])
    return where.replace("\\", "/").rpartition("/")[2]
