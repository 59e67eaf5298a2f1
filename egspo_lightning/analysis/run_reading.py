"""Run folders: their names, metrics, benchmark results, config and token records, as the report needs them."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from egspo_lightning.analysis.record_reading import load_metrics, read_records
from egspo_lightning.analysis.record_schema import FOLDER, files_of
from egspo_lightning.errors import UserError, did_you_mean

LOGS = ("events.out.tfevents.*", "metrics.csv", "benchmarks.jsonl", f"{FOLDER}/tokens-*.parquet")
"""Patterns of the files that make a folder a run."""
EXPECTED = (
    "events.out.tfevents.* or metrics.csv (metrics), benchmarks.jsonl (scores), config.yaml (settings) or "
    f"{FOLDER}/ (completions)"
)
NUM_NAMED = 5
"""Run folders that an error message lists."""
MAX_DEPTH = 3
"""Levels below a folder at which runs are looked for."""


class Run(NamedTuple):
    """Contents of the log folder of a run; a part that the run did not write is empty."""

    name: str
    folder: Path
    config: dict[str, Any]
    phases: pd.DataFrame
    """a row a phase: its metrics, ``steps`` (optimizer steps taken), ``batches`` (rollout batches trained on; NaN in
    stage SFT)"""
    scores: list[dict[str, Any]]
    """the rows of ``benchmarks.jsonl``"""
    completions: pd.DataFrame
    tokens: pd.DataFrame

    @property
    def transition(self) -> int | None:
        """Optimizer steps taken at the stage transition; None where the run has only one stage."""
        is_sft = self.phases["batches"].isna()
        return int(self.phases["steps"][is_sft].max()) if is_sft.any() and not is_sft.all() else None

    def batches_at(self, steps: int) -> int | None:
        """Rollout batches trained on after a number of optimizer steps; None within stage SFT."""
        if self.transition is not None and steps < self.transition:
            return None
        return int((self.phases["batches"].notna() & (self.phases["steps"] <= steps)).sum())


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read runs.

    Args:
        folders: log folders, each with a name in front if wanted: ``NAME=FOLDER``

    Raises:
        UserError: a folder is no run, or two runs have one name.
    """
    named = [_split(folder) for folder in folders]
    for _, path in named:
        _require_run(path)
    names = [given or short for (given, _), short in zip(named, _short_names([p for _, p in named]), strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"Two runs have one name: {', '.join(names)}. Give names: NAME={folders[0]}.")
    return [_read_run(name, path) for name, (_, path) in zip(names, named, strict=True)]


def is_run(folder: Path) -> bool:
    """Whether a folder holds logs of a run."""
    return any(next(folder.glob(pattern), None) is not None for pattern in LOGS)


def _split(folder: str) -> tuple[str, Path]:
    name, equals, path = folder.partition("=")
    return (name, Path(path)) if equals and not Path(folder).exists() else ("", Path(folder))


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The parts of the paths in which they differ; the last part of a single path."""
    parts = [folder.resolve().parts for folder in folders]
    shared_start = _num_shared(parts)
    shared_end = _num_shared([path[:shared_start:-1] for path in parts])
    cut = [path[shared_start : len(path) - shared_end] for path in parts]
    return ["/".join(path) or folder.resolve().name for path, folder in zip(cut, folders, strict=True)]


def _num_shared(paths: Sequence[Sequence[str]]) -> int:
    """Number of leading parts that all paths share."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def _require_run(folder: Path) -> None:
    if folder.is_dir() and is_run(folder):
        return
    what = "no such folder" if not folder.exists() else f"no logs of a run in it. Expected: {EXPECTED}"
    root = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    runs = sorted(_runs_below(root, MAX_DEPTH), key=os.path.getmtime, reverse=True)[:NUM_NAMED]
    if not runs:
        raise UserError(f"{folder}: {what}. No run was found below {root}.")
    close = did_you_mean(str(folder), map(str, runs)).replace("Known here", f"Runs below {root}")
    raise UserError(f"{folder}: {what}. {close}.")


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth:
        inside = (entry for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
        for entry in islice(sorted(inside, key=lambda entry: entry.name), 200):
            yield from _runs_below(folder / entry.name, depth - 1)


def _read_run(name: str, folder: Path) -> Run:
    kinds = ("completions", "tokens")
    has_records = all(files_of(folder, kind) for kind in kinds)
    completions, tokens = (read_records(folder, kind) if has_records else pd.DataFrame() for kind in kinds)
    config = _read_config(folder / "config.yaml")
    return Run(name, folder, config, _phases(load_metrics(folder)), _read_scores(folder), completions, tokens)


def _phases(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows of phases. A phase is logged at the index of its last optimizer step."""
    if "stage" not in metrics:
        return pd.DataFrame({"steps": [], "batches": []})
    phases = metrics[metrics["stage"].notna()].copy()
    phases["steps"] = phases["step"].astype(int) + 1
    is_rollout = phases["stage"] == 1
    phases["batches"] = is_rollout.cumsum().where(is_rollout)
    return phases


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from error
    return dict(read) if isinstance(read, Mapping) else {}


def _read_scores(folder: Path) -> list[dict[str, Any]]:
    path = folder / "benchmarks.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    try:  # a run that is being written may end with half a line
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not readable as JSON lines: {error}") from error
