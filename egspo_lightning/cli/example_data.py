"""Example data: files of generated word problems, in the form in which own data is given."""

import json
from collections.abc import Sequence
from pathlib import Path

from egspo_lightning.data.tasks.family import Split
from egspo_lightning.data.tasks.word_problems import WordProblemTask
from egspo_lightning.errors import UserError

FOLDER = "word_problems"
NUM_ROWS: dict[Split, int] = {"train": 1000, "test": 200}


def write_example_data(arguments: Sequence[str]) -> str:
    """Write ``train.jsonl`` and ``test.jsonl`` into a folder, and return a line that says so.

    Args:
        arguments: the folder, or none for ``word_problems``

    Raises:
        UserError: there are more arguments or flags, or the folder cannot be written.
    """
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        raise UserError(f"example_data takes one folder, got {' '.join(arguments)}. Usage: egspo example_data FOLDER")
    folder = Path(arguments[0] if arguments else FOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split in NUM_ROWS:
            lines = "".join(json.dumps(row) + "\n" for row in example_rows(split))
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    except OSError as error:
        raise UserError(f"example_data: {folder} cannot be written ({error.strerror}). Name another folder.") from error
    written = " and ".join(f"{folder / split}.jsonl ({number} rows)" for split, number in NUM_ROWS.items())
    return f"Wrote {written}."


def example_rows(split: Split) -> list[dict[str, str]]:
    """Different problems of a split, with their solutions and answers; always the same."""
    task = WordProblemTask()
    problems = task.distinct("example data", split, NUM_ROWS[split])
    return [
        {"problem": each.problem, "solution": task.solve(each).solution, "answer": each.answer} for each in problems
    ]
