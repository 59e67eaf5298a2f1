"""Resumable evaluation: answers are written to disk as they are sampled."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.answers import Answer
from egspo_lightning.types import Problem

COMPLETIONS, SETTINGS, METRICS = "completions.jsonl", "settings.json", "metrics.json"
_COLUMNS = Answer._fields[1:]  # the problem's are named one by one


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Hash all settings into twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    _replace(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class Journal:
    """The answers to one benchmark under one set of settings, in their own folder.

    Each rank appends to ``completions-rank-R.jsonl``. At the end these files are merged into ``completions.jsonl`` in
    the benchmark's order, so the file does not depend on ranks or interruptions. A later evaluation with the same
    settings reuses the answers, on any number of ranks that see the folder.

    Args:
        folder: The folder, made when needed.
        settings: All settings that determine the answers; kept in settings.json.
        problems: The benchmark's problems.
        num_samples: Answers to each problem; a problem with fewer counts as not answered.
        rank: This process's rank.
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
        """The merged file of answers."""
        return self.folder / COMPLETIONS

    def claim(self) -> None:
        """Create the folder, or check that its answers have the same settings.

        Raises:
            UserError: the folder holds the answers of an evaluation with other settings.
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
                "delete this one."
            )

    def read(self) -> dict[str, list[Answer]]:
        """Read the answers of all ranks and earlier evaluations, by problem id; only problems with all samples.

        An incomplete last line, as an interrupted write leaves it, is ignored.

        Raises:
            UserError: another line is broken.
        """
        found: dict[str, dict[int, Answer]] = {}
        for path in sorted(self.folder.glob("completions*.jsonl")):
            for row in _rows(path):
                if (problem := self.problems.get(row["id"])) is not None:
                    answer = Answer(problem, **{name: row[name] for name in _COLUMNS})
                    found.setdefault(problem.id, {})[answer.sample] = answer
        complete = {
            identity: [found[identity][i] for i in range(self.num_samples)]
            for identity in self.problems
            if len(found.get(identity, ())) == self.num_samples
        }
        self._held = set(complete)
        return complete

    def append(self, answers: Sequence[Answer]) -> None:
        """Append new answers in one write, without those that ``read`` has returned."""
        new = [answer for answer in answers if answer.problem.id not in self._held]
        if not new:
            return
        with self._own.open("ab") as file:
            _truncate_incomplete_line(self._own)
            file.write("".join(self._line(answer) for answer in new).encode())

    def merge(self) -> None:
        """Merge the files of all ranks into one. One rank calls it after all ranks have appended."""
        parts = list(self.folder.glob("completions-rank-*.jsonl"))
        if parts:
            answers = self.read()
            _replace(self.completions, "".join(self._line(answer) for group in answers.values() for answer in group))
        for part in parts:
            part.unlink()

    def _line(self, answer: Answer) -> str:
        problem = answer.problem
        row = {"benchmark": self.settings["benchmark"], "id": problem.id, "problem": problem.problem}
        row |= {"answer": problem.answer or None} | {name: getattr(answer, name) for name in _COLUMNS}
        return json.dumps(row, ensure_ascii=False) + "\n"


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    *lines, _ = path.read_bytes().split(b"\n")  # the text after the last newline is incomplete, or empty
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: broken ({error}). Delete the line to sample the answer again.") from None


def _truncate_incomplete_line(path: Path) -> None:
    whole = path.read_bytes().rfind(b"\n") + 1
    if whole < path.stat().st_size:
        os.truncate(path, whole)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
