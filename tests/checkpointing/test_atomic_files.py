"""Atomic replacement of checkpoints: files, folders and links by one another."""

import pytest

from egspo_lightning.checkpointing import atomic_files


def make(path, kind, text):
    """A checkpoint that holds a text: a file, a folder with one file, or a link to a file."""
    if kind == "folder":
        path.mkdir()
        (path / "shard").write_text(text)
    elif kind == "link":
        target = path.with_name(f"target of {path.name}")
        target.write_text(text)
        path.symlink_to(target)
    else:
        path.write_text(text)


@pytest.mark.parametrize("old", ["nothing", "file", "folder", "link"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_a_checkpoint_replaces_one_of_another_kind(tmp_path, old, new):
    path = tmp_path / "last.ckpt"
    if old != "nothing":
        make(path, old, "old")
    partial = atomic_files.partial_of(path)
    make(partial, new, "new")
    atomic_files.replace(partial, path)
    assert (path / "shard" if new == "folder" else path).read_text() == "new"
    assert not path.is_symlink()
    left = {found.name for found in tmp_path.iterdir()} - {"target of last.ckpt"}
    assert left == {"last.ckpt"}
