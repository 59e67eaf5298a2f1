"""Atomic replacement of checkpoints, files or folders of shards: the old or the new one exists at any time.

Only the first rank calls these functions.
"""

import os
import shutil
from pathlib import Path

PARTIAL, PREVIOUS = ".partial", ".previous"
"""Suffixes of a checkpoint that is being written, and of the one that it replaces until that is deleted."""


def partial_of(path: Path) -> Path:
    """Where a checkpoint is written before ``replace`` renames it."""
    return path.with_name(path.name + PARTIAL)


def replace(partial: Path, path: Path) -> None:
    """Replace a file by a file in one step once it is on disk; with a folder, the old one is renamed first."""
    if partial.is_file():
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    is_file = partial.is_file() and (path.is_file() or path.is_symlink())
    if is_file or not (path.exists() or path.is_symlink()):
        os.replace(partial, path)
        return
    previous = path.with_name(path.name + PREVIOUS)
    delete(previous)
    path.rename(previous)
    partial.rename(path)
    delete(previous)


def link(saved: Path, path: Path) -> None:
    """Give a checkpoint a second name: a hard link of each file, or a copy where there are none."""
    delete(path)
    if saved.is_dir():
        shutil.copytree(saved, path, copy_function=_link_file)
    else:
        _link_file(saved, path)


def _link_file(saved: str | Path, path: str | Path) -> None:
    try:
        os.link(saved, path)
    except OSError:
        shutil.copy2(saved, path)


def recover(folder: Path) -> None:
    """Clean up after a process that was killed while it saved."""
    for previous in folder.glob(f"*{PREVIOUS}"):
        path = previous.with_name(previous.name.removesuffix(PREVIOUS))
        if path.exists():
            delete(previous)
        else:
            previous.rename(path)
    for partial in folder.glob(f"*{PARTIAL}"):
        delete(partial)


def delete(path: Path) -> None:
    """Delete a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
