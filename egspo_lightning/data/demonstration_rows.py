"""From a row to a demonstration, wherever the row came from."""

from typing import Any

from egspo_lightning.data.answer_formats import SolutionFormat, boxed_solution
from egspo_lightning.data.json_lines import text_field
from egspo_lightning.data.rows import row_id
from egspo_lightning.types import Demonstration


def demonstration_of(
    row: dict[str, Any],
    where: str,
    problem_field: str,
    solution_field: str,
    answer_field: str | None,
    solution_format: SolutionFormat,
) -> Demonstration:
    r"""The demonstration that a row holds, its solution brought to end in ``\boxed{}``.

    Raises:
        UserError: the problem or the solution is absent or empty, or no answer can be found.
    """
    problem = text_field(row, problem_field, where)
    solution = text_field(row, solution_field, where)
    answer = row.get(answer_field) if answer_field else None
    given = None if answer is None else str(answer)
    return Demonstration(row_id(row, where), problem, boxed_solution(solution, given, solution_format, where))
