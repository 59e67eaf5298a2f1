"""Environment checks before a run: variables of the process group, and the folder for logs."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from egspo_lightning.errors import UserError

COUNTS = {
    "MASTER_PORT": 65535,
    "LOCAL_RANK": None,
    "GLOBAL_RANK": None,
    "RANK": None,
    "NODE_RANK": None,
    "GROUP_RANK": None,
    "WORLD_SIZE": None,
    "LOCAL_WORLD_SIZE": None,
    "SLURM_NTASKS": None,
    "SLURM_PROCID": None,
    "SLURM_LOCALID": None,
}
"""Variables of the process group, and the largest allowed value of each."""


def require_ranks(environment: Mapping[str, str]) -> None:
    """Refuse variables that are not whole numbers, on which the libraries would fail after the ranks have started.

    Raises:
        UserError: naming the variable.
    """
    for name, most in COUNTS.items():
        value = environment.get(name)
        if value is None:
            continue
        allowed = "a whole number" if most is None else f"a whole number up to {most}"
        if not value.isascii() or not value.isdigit() or (most is not None and int(value) > most):
            raise UserError(
                f"environment variable {name} must be {allowed}, got {value!r}. Set it so, or unset it: a run on one "
                "machine needs none of them."
            )


def require_writable(folder: str | Path, field: str) -> None:
    """Make the folder and write a temporary file into it, so that a failure comes before the first checkpoint.

    Raises:
        UserError: naming field, folder and reason.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"{field}: cannot write into {folder}: {reason}. Give a folder that you may write to."
        ) from error
