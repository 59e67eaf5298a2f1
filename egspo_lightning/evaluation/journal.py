"""Answers on disk, written as they come, so that an evaluation that was cut off goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.answer_records import Answer, answer_of, row_of
from egspo_lightning.types import Problem

COMPLETIONS, SETTINGS, METRICS = "completions.jsonl", "settings.json", "metrics.json"


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for all settings: other settings, other digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def write_json(path: Path, value: Any) -> None:
    """Write a file as a whole or not at all."""
    _replace(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class Journal:
    """The answers to one benchmark under one set of settings, in a folder of their own.

    While it is answered each rank appends to ``completions-rank-R.jsonl``; at the end these files become one,
    ``completions.jsonl``, in the benchmark's order: the same file whatever the ranks and interruptions were. A later
    evaluation with the same settings, on any number of ranks that see the folder, takes the answers up.

    Args:
        folder: Where to; made when needed.
        settings: All that decides on the answers; kept beside them, in settings.json.
        problems: What the benchmark asks.
        num_samples: Answers a problem; a problem with fewer counts as not answered.
        rank: Who appends.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], problems: Sequence[Problem], num_samples: int, rank: int
    ) -> None:
        self.folder, self.settings, self.num_samples = folder, dict(settings), num_samples
        self.problems = {problem.id: problem for problem in problems}
        self._own = folder / f"completions-rank-{rank}.jsonl"
        self._held: set[str] = set()

    @property
    def completions(self) -> Path:
        """Where the answers are in the end."""
        return self.folder / COMPLETIONS

    def claim(self) -> None:
        """Make the folder this evaluation's.

        Raises:
            UserError: it holds the answers of an evaluation with other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / SETTINGS
        if not path.is_file():
            write_json(path, self.settings)
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(k for k in found.keys() | self.settings.keys() if found.get(k) != self.settings.get(k))
        if differing:
            raise UserError(
                f"{self.folder} holds answers under other settings: {', '.join(differing)}. Choose another folder, or "
                "delete this one to begin anew."
            )

    def read(self) -> dict[str, list[Answer]]:
        """The answers of all ranks and earlier evaluations, by the id of their problem; complete problems alone.

        A last line that was cut off is left out.

        Raises:
            UserError: another line is broken.
        """
        found: dict[str, dict[int, Answer]] = {}
        for path in sorted(self.folder.glob("completions*.jsonl")):
            for row in _rows(path):
                if (problem := self.problems.get(row["id"])) is not None:
                    found.setdefault(problem.id, {})[row["sample"]] = answer_of(row, problem)
        complete = {
            identity: [found[identity][i] for i in range(self.num_samples)]
            for identity in self.problems
            if len(found.get(identity, ())) == self.num_samples
        }
        self._held = set(complete)
        return complete

    def append(self, answers: Sequence[Answer]) -> None:
        """Write new answers, all at once and at once; those that ``read`` has given are there already."""
        new = [answer for answer in answers if answer.problem.id not in self._held]
        if not new:
            return
        with self._own.open("ab") as file:
            _cut_torn_line(self._own)
            file.write("".join(self._line(answer) for answer in new).encode())

    def merge(self) -> None:
        """Make one file of those of all ranks; for one rank to call, when all have appended."""
        parts = list(self.folder.glob("completions-rank-*.jsonl"))
        if parts:
            answers = self.read()
            _replace(self.completions, "".join(self._line(answer) for group in answers.values() for answer in group))
        for part in parts:
            part.unlink()

    def _line(self, answer: Answer) -> str:
        return json.dumps(row_of(self.settings["benchmark"], answer), ensure_ascii=False) + "\n"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last newline is torn, or empty
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: broken ({error}). Delete the line, and it is answered again.") from None


def _cut_torn_line(path: Path) -> None:
    whole = path.read_bytes().rfind(b"\n") + 1
    if whole < path.stat().st_size:
        os.truncate(path, whole)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
