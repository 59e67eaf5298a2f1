"""Token records and metrics of one or several runs, as pandas data frames."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from egspo_lightning.analysis.record_schema import FOLDER, STAGE_MARK, VERSION, VERSION_KEY, files_of
from egspo_lightning.errors import UserError


class Records(NamedTuple):
    """Token records and metrics; the column ``run`` of each frame names the run."""

    tokens: pd.DataFrame
    """a row a token, see ``record_schema.TOKENS``"""
    completions: pd.DataFrame
    """a row a completion, see ``record_schema.COMPLETIONS``"""
    metrics: pd.DataFrame
    """a row a logged step, a column a metric (``gate/threshold``, ...); empty if no logger wrote any"""


Runs = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
"""A log folder, several folders, or a mapping from name to folder."""


def load(runs: Runs) -> Records:
    """Read the records and metrics of runs.

    Args:
        runs: log folders, as printed by the runs; without names, a run has the name of its folder

    Raises:
        UserError: a folder does not exist or has no records of this version, or two runs have one name
    """
    parts = [_load_run(name, folder) for name, folder in _named(runs).items()]
    return Records(*(pd.concat(frames, ignore_index=True) for frames in zip(*parts, strict=True)))


def runs_below(folder: str | Path) -> list[Path]:
    """Find the log folders with token records below a folder, the latest last.

    Raises:
        UserError: there is none
    """
    found = {path.parent.parent for path in Path(folder).glob(f"**/{FOLDER}/tokens-*.parquet")}
    if not found:
        raise UserError(f"{folder}: no run with token records below it. Train one, or name another folder.")
    return sorted(found, key=lambda run: (max(path.stat().st_mtime for path in files_of(run, "tokens")), run))


def _named(runs: Runs) -> dict[str, Path]:
    if isinstance(runs, Mapping):
        return {name: Path(folder) for name, folder in runs.items()}
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(folder) for folder in runs]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"Two runs have one name: {', '.join(names)}. Give names: {{'egspo': folder, ...}}.")
    return dict(zip(names, folders, strict=True))


def _load_run(name: str, folder: Path) -> Records:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run. Give a log folder, as in logs/lightning_logs/version_0.")
    tokens, completions = (read_records(folder, kind) for kind in ("tokens", "completions"))
    for frame in (tokens, completions, metrics := load_metrics(folder)):
        frame.insert(0, "run", name)
    return Records(tokens, completions, metrics)


def read_records(folder: Path, kind: str) -> pd.DataFrame:
    """All ``tokens`` or ``completions`` of a run as one frame.

    Raises:
        UserError: there are none, or none that this release reads.
    """
    tables = [_read_file(path) for path in files_of(folder, kind)]
    if not tables:
        raise UserError(
            f"{folder}: no token records ({kind}) in its {FOLDER}/. They are written in stage EGSPO, at the "
            "interval token_records.every_n_rollout_batches."
        )
    return pa.concat_tables(tables, promote_options="default").to_pandas()


def _read_file(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error
    found = (table.schema.metadata or {}).get(VERSION_KEY, b"none").decode()
    if found != VERSION:
        raise UserError(
            f"{path}: token records of version {found}, where this release reads version {VERSION}. Read them with the "
            "release that wrote them, or train again."
        )
    return table


def load_metrics(folder: Path) -> pd.DataFrame:
    """A row a step, from the CSV logger's file if there is one, else from TensorBoard's events."""
    csv = folder / "metrics.csv"
    if csv.exists():
        return pd.read_csv(csv).groupby("step", as_index=False).first()
    if not any(folder.glob("events.out.tfevents.*")):
        return pd.DataFrame({"step": []})
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(f"{STAGE_MARK}/")]
    columns = {tag: pd.Series({event.step: event.value for event in events.Scalars(tag)}) for tag in tags}
    return pd.DataFrame(columns).rename_axis("step").reset_index()
