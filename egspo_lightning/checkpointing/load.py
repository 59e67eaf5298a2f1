"""Loads checkpoints as plain data without running code, and explains damaged and foreign files."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from egspo_lightning.errors import UserError

SHARDED_PARTS = ("meta.pt", ".metadata")
"""Files in the folder of a sharded checkpoint besides the shards."""
WRITER = "pytorch-lightning_version"
"""Key that Lightning writes into every checkpoint."""


def open_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint; a file's tensors are read when they are used, a sharded checkpoint's are left out.

    Raises:
        UserError: it is no checkpoint of this program, is incomplete, or would have to run code.
    """
    if not path.exists():
        raise UserError(f"ckpt_path: no such file or folder: {path}.")
    missing = [name for name in SHARDED_PARTS if not (path / name).is_file()]
    if path.is_dir() and missing:
        raise UserError(
            f"ckpt_path: {path} is a folder without {' and '.join(missing)}, so it is no sharded checkpoint. Give the "
            "folder that the run wrote, or a .ckpt file."
        )
    content: Any = _load(path / SHARDED_PARTS[0] if path.is_dir() else path)
    if not isinstance(content, dict) or "egspo" not in content or WRITER not in content:
        raise UserError(
            f"ckpt_path: {path} was not written by EGSPOModule. To start from a model's weights, give its folder as "
            "model.policy.name_or_path."
        )
    return content


def _load(path: Path) -> Any:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            is_cut = file.read(2) in (b"", b"PK")
        what = "is empty or was cut off while it was written or copied" if is_cut else "is no checkpoint"
        raise UserError(f"ckpt_path: {path} {what}. Give a .ckpt file that this program wrote, such as last.ckpt.")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), "it is no plain data")
        raise UserError(
            f"ckpt_path: {path} would have to run code to be loaded ({reason.strip().split('. ')[0]}), and is not "
            "loaded. Checkpoints of this program hold only plain data."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"ckpt_path: {path} is damaged or no checkpoint: {reason} Take an earlier one.") from error
