"""Training data from files, local folders and the Hugging Face Hub."""

from dataclasses import dataclass

from egspo_lightning.data.answer_formats import SolutionFormat
from egspo_lightning.data.row_values import Fields
from egspo_lightning.data.rows import DatasetRows, ProblemRows, demonstration_of
from egspo_lightning.data.sources import DemonstrationSource, FiniteProblems
from egspo_lightning.types import Demonstration, Problem


@dataclass
class DatasetDemonstrations(DatasetRows, DemonstrationSource):
    r"""Expert demonstrations from a file, a local folder or the Hugging Face Hub; a row's own ``id`` is kept.

    Args:
        answer_field: The column that holds the bare answer; needed only where the solution does not give it. null for
            answer.
        solution_field: The column that holds the worked solution, as text or as messages. null for the assistant's
            last turn where the problem is a conversation that ends in one, else for the first of solution, completion
            and, as GSM8K has it, answer.
        solution_format: How solutions end: "boxed" (left as they are), "gsm8k" (calculator marks are removed and
            "#### 72" becomes "\\boxed{72}"), "plain" ("\\boxed{answer}" is appended), or "auto" (the first of these
            that a row allows).
    """

    solution_field: str | None = None
    solution_format: SolutionFormat = "auto"

    def load(self) -> list[Demonstration]:
        """The demonstrations, in the order of the data."""
        fields, columns = Fields(self.problem_field, self.answer_field, self.solution_field), self.reward_columns
        return [demonstration_of(row, where, fields, self.solution_format, columns) for where, row in self.rows()]


@dataclass
class DatasetProblems(ProblemRows, FiniteProblems):
    """Problems with gold answers from a file, a local folder or the Hugging Face Hub."""

    def load(self) -> list[Problem]:
        """The problems, in the order of the data."""
        return self.read_problems(columns=self.reward_columns)

    def load_questions(self) -> list[Problem]:
        """The problems for ``predict``; a row, or the whole data set, may have no answer."""
        return self.read_problems(needs_answer=False)
