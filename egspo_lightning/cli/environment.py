"""Environment checks before a run: variables of the process group, and the folder for logs."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from egspo_lightning.errors import UserError

RANKS = ("RANK", "LOCAL_RANK", "GLOBAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID")
LIMITS = {"MASTER_PORT": 65535, **dict.fromkeys((*RANKS, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS"))}
"""Variables of the process group, and the largest allowed value of each; None for no limit."""


def require_ranks(environment: Mapping[str, str]) -> None:
    """Refuse variables that are not whole numbers, on which the libraries would fail after the ranks have started.

    Raises:
        UserError: naming the variable.
    """
    for name, most in LIMITS.items():
        value = environment.get(name, "0")
        if not value.isascii() or not value.isdigit() or (most is not None and int(value) > most):
            allowed = "a whole number" if most is None else f"a whole number up to {most}"
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
