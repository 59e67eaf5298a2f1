"""Reading JSON Lines so that a bad row is told by its file and line number."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from egspo_lightning.errors import UserError

GZIP = b"\x1f\x8b"
"""What a packed file begins with."""


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``("FILE:LINE", row)`` for each non-empty line of a UTF-8 JSON Lines file.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or a line is not a JSON object.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Give the path of a JSON Lines file (one JSON object a line).")
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the path of a JSON Lines file (one JSON object a line).")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith(GZIP):
                raise UserError(f"{path}: is packed with gzip. Unpack it first: gunzip < {path.name} > rows.jsonl")
            if line.strip():
                where = f"{path}:{number}"
                yield where, _parse(line, where)


def text_field(row: dict[str, Any], field: str, where: str) -> str:
    """The text of a field; numbers are taken as they are written.

    Raises:
        UserError: the field is absent, empty or neither text nor a number.
    """
    value = row.get(field)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        shown = "nothing" if field not in row else repr(value)
        raise UserError(
            f"{where}: field {field!r} must be non-empty text, got {shown}. The row has the fields {', '.join(row)}."
        )
    require_storable(value, field, where)
    return value


def require_storable(text: str, field: str, where: str) -> None:
    """Refuse what JSON lets through, and neither tokenizers nor files of records take.

    Raises:
        UserError: the text holds NUL or half of a surrogate pair.
    """
    if "\0" in text:
        raise UserError(f"{where}: field {field!r} holds the character NUL (\\u0000). Remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field!r} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no "
            "character. Remove it."
        ) from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid UTF-8 ({error.reason} at byte {error.start}). Re-encode it.") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply. One JSON object a line is expected.") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}). One JSON object a line is expected.") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object is expected, got {type(row).__name__}.")
    for field, value in row.items():
        if isinstance(value, str):
            require_storable(value, field, where)
    return row
