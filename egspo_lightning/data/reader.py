"""Reader of rows: JSON Lines, CSV, JSON, Parquet and Arrow files, and data sets of the Hugging Face Hub."""

import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

from egspo_lightning.errors import UserError, did_you_mean

Row = tuple[str, dict[str, Any]]
"""The place of a row ("data/train.jsonl:12", "openai/gsm8k:train:11"), for errors, and its fields."""

GZIP = b"\x1f\x8b"
"""The first bytes of a gzip file."""
_PART = re.compile(r"\w+\[(-?\d*%?):(-?\d*%?)\]")
_BUILDERS = {".jsonl": "json", ".csv": "csv", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
"""File suffix to the builder of the datasets library."""


def read_rows(path: str, config: str | None = None, split: str = "train") -> Iterator[Row]:
    """Yield the rows of a file, a local folder or a data set of the Hub.

    JSON Lines and CSV files are read line by line: errors name the line, and CSV numbers keep their digits. The
    ``datasets`` library reads everything else.

    Args:
        path: A file (.jsonl, .csv, .json, .parquet or .arrow), a pattern of files ("parts/*.parquet"), a local folder
            of files, a folder written by ``save_to_disk``, or a data set's name on the Hub. A file with another suffix
            is read as JSON Lines.
        config: The configuration of a data set that has several.
        split: The split of the data set, or a part of it ("train[:1000]"). JSON Lines and CSV files have only
            parts, whatever the split's name.

    Raises:
        UserError: the rows cannot be read, a line is malformed, or a text holds NUL or half of a surrogate pair, which
            neither tokenizers nor JSON files take.
    """
    rows: Iterable[Row]
    suffix, is_file = Path(path).suffix, Path(path).is_file()
    is_local = "://" not in path and (suffix in _BUILDERS or is_file) and not Path(path).is_dir()
    files = sorted(glob(path)) or [path] * is_file if is_local else []  # a name with brackets matches no pattern
    if is_local and not files:
        raise _no_such_file(path)
    if is_local and (suffix in (".jsonl", ".csv") or suffix not in _BUILDERS):
        rows = _part(chain.from_iterable(map(_csv_rows if suffix == ".csv" else _json_lines, map(Path, files))), split)
    else:
        rows = _dataset_rows(path, config, split)
    for where, row in rows:
        for field, value in row.items():
            _require_storable(value, field, where)
        yield where, row


def _part(rows: Iterable[Row], split: str) -> Iterable[Row]:
    """The rows of a part such as "train[40:]" or "test[:10%]"; all rows of a split without brackets."""
    if "[" not in split:
        return rows
    match = _PART.fullmatch(split)
    if match is None:
        raise UserError(f'split = {split!r}: write a part as "train[:40]", "train[40:]", "train[10:40]" or in percent.')
    found = list(rows)
    start, end = (_place(bound, len(found)) for bound in match.groups())
    return found[start:end]


def _place(bound: str, num_rows: int) -> int | None:
    number = bound.removesuffix("%")
    return None if not number else round(int(number) * num_rows / 100) if bound.endswith("%") else int(number)


def _no_such_file(path: str) -> UserError:
    return UserError(
        f"{path}: no such file.{_similar(path)} Give the path of a file or folder, or a data set's name on the Hub."
    )


def _similar(path: str) -> str:
    """The guess at a path beside one that does not exist; empty where none is similar."""
    folder = Path(path).parent
    beside = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(Path(path).name, beside, n=1)
    return f" Did you mean {folder / close[0]}?" if close else ""


def _json_lines(path: Path) -> Iterator[Row]:
    """One row for each line that is not empty; the first line is number 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(GZIP):
                raise UserError(f"{path}: compressed with gzip. Unpack it first: gunzip < {path.name} > rows.jsonl")
            if line.strip():
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_float=Decimal)  # numbers keep their digits
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid UTF-8 ({error.reason} at byte {error.start}). Re-encode it.") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply. One JSON object a line is expected.") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}). One JSON object a line is expected.") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object is expected, got {type(row).__name__}.")
    return row


def _csv_rows(path: Path) -> Iterator[Row]:
    """One row for each record; the first line names the fields, and all values are texts."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="values without a field")
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}:{reader.line_num + 1}: not valid CSV in UTF-8 ({error}).") from None


def _dataset_rows(path: str, config: str | None, split: str) -> Iterator[Row]:
    """The rows of a data set, counted from 0 as in the viewer of the Hub."""
    try:
        table = _load_dataset(path, config, split)
    except UserError:
        raise
    except Exception as error:  # the library raises whatever its file systems and HTTP clients raise
        if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
            raise _no_such_file(path) from error  # no name on the Hub
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        guess = "" if Path(path).exists() else _similar(path)
        raise UserError(
            f"data set {path!r} (config {config!r}, split {split!r}) could not be loaded: {reason}{guess} "
            "Check its name, config and split. Without a network, download it beforehand and give the path of a "
            "local folder or file."
        ) from error
    for number, row in enumerate(table):
        yield f"{path}:{split}:{number}", row


def _load_dataset(path: str, config: str | None, split: str) -> Any:
    import datasets

    split_name = re.split(r"[\[+]", split)[0]
    folder = _saved_split(Path(path), split_name)
    if (folder / "state.json").is_file():  # written by save_to_disk, which load_dataset refuses
        return datasets.load_dataset("arrow", data_files={split_name: f"{folder}/*.arrow"}, split=split)
    builder = None if folder.is_dir() else _BUILDERS.get(folder.suffix)
    if builder is not None:
        return datasets.load_dataset(builder, data_files={split_name: path}, split=split)
    return datasets.load_dataset(path, config, split=split)


def _saved_split(folder: Path, split: str) -> Path:
    """The folder of a split, where ``save_to_disk`` wrote several; otherwise the folder itself."""
    index = folder / "dataset_dict.json"
    if not index.is_file():
        return folder
    splits = json.loads(index.read_text(encoding="utf-8"))["splits"]
    if split not in splits:
        raise UserError(f"{folder}: no split {split!r}. {did_you_mean(split, splits)}. Set split to one of them.")
    return folder / split


def _require_storable(value: Any, field: str, where: str) -> None:
    """Refuse a text, also within lists and mappings, that neither tokenizers nor files of records take."""
    parts = [value]
    while parts:  # no recursion: JSON may be nested more deeply than Python calls
        part = parts.pop()
        if isinstance(part, str):
            _require_storable_text(part, field, where)
        elif isinstance(part, dict | list):
            parts += part.values() if isinstance(part, dict) else part


def _require_storable_text(value: str, field: str, where: str) -> None:
    if "\0" in value:
        raise UserError(f"{where}: field {field!r} holds the character NUL (\\u0000). Remove it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field!r} holds half of a surrogate pair (\\u{ord(value[error.start]):04x}), which is no "
            "character. Remove it."
        ) from None
