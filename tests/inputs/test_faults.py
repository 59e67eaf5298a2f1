"""System faults during a run: one clear message, no orphan process, and the last checkpoint stays valid."""

import hashlib
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from egspo_lightning.cli.exit_codes import FAULTS, judge
from egspo_lightning.errors import RunStopped


@pytest.fixture
def resumable(start, smallest, small_model, tmp_path):
    """A run set up to resume from its finished checkpoint, and the path of that checkpoint."""
    run = smallest(tmp_path, small_model)
    run.put("checkpoint.dirpath", str(tmp_path / "kept"))
    run.put("token_records.every_n_rollout_batches", 1)
    ended = start(tmp_path, *run.command)
    assert ended.code == 0, ended.output
    last = tmp_path / "kept" / "last.ckpt"
    run.put("trainer.max_epochs", 4)
    run.arguments = [f"--ckpt_path={last}"]
    return run, last


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_full_disk_during_checkpoint_save_keeps_last_checkpoint(start, resumable):
    run, last = resumable
    before = digest(last)
    ended = start(run.folder, *run.command, file_size=100_000)
    assert ended.code == 1
    assert "Traceback" not in ended.output
    assert "error: File too large" in ended.output
    assert "ulimit -f" in ended.output
    assert ended.orphans == []
    assert digest(last) == before
    for path in run.folder.rglob("*.ckpt"):
        torch.load(path, weights_only=True)
    again = start(run.folder, *run.command)
    assert again.code == 0, again.output
    epochs = [torch.load(path, weights_only=True)["epoch"] for path in last.parent.glob("*.ckpt")]
    assert max(epochs) == 3


@pytest.mark.slow
def test_full_disk_during_token_records_keeps_last_checkpoint(start, resumable):
    run, last = resumable
    run.put("checkpoint.every_n_epochs", 100)
    run.put("trainer.logger", False)  # the logger's thread would also hit the full disk
    before = digest(last)
    ended = start(run.folder, *run.command, file_size=6_000)
    assert ended.code == 1
    assert "Traceback" not in ended.output
    assert "File too large" in ended.output.splitlines()[-1]
    assert digest(last) == before
    run.put("trainer.logger", True)
    assert start(run.folder, *run.command).code == 0


def test_file_at_checkpoint_folder_path_prints_one_error(start, smallest, small_model, tmp_path):
    run = smallest(tmp_path, small_model)
    (tmp_path / "kept").write_text("")
    run.put("checkpoint.dirpath", str(tmp_path / "kept"))
    ended = start(tmp_path, *run.command)
    assert ended.code == 1
    assert "Traceback" not in ended.output
    assert str(tmp_path / "kept") in ended.output
    assert ended.orphans == []


@pytest.mark.parametrize("number", FAULTS)
def test_every_fault_message_names_file_and_debug_flag(number):
    ending = judge(OSError(number, "what happened", "/some/file"))
    assert ending.code == 1
    assert ending.is_foreseen
    assert "/some/file" in ending.text
    assert "--debug" in ending.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_is_no_error(number):
    ending = judge(KeyboardInterrupt() if number == signal.SIGINT else SIGTERMException())
    assert ending.code == 128 + number
    assert ending.is_foreseen
    assert f"Ended by {number.name}." in ending.text
    assert "error" not in ending.text
    assert str(RunStopped(number, None, is_first_rank=True)).startswith(f"Ended by {number.name}.")


def test_unforeseen_exception_asks_for_a_report():
    for error in (RuntimeError("a"), KeyError("b"), ValueError("c"), AssertionError()):
        ending = judge(error)
        assert not ending.is_foreseen
        assert type(error).__name__ in ending.text
        assert "Report it" in ending.text


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "silently"), [(0, False), (1, False), (1, True)])
def test_failure_of_one_rank_ends_all_ranks(start, smallest, small_model, tmp_path, rank, silently):
    run = smallest(tmp_path, small_model)
    run.put("trainer.strategy", "ddp")
    run.put("trainer.devices", 2)
    run.put("trainer.callbacks", [{"class_path": "failing.Fail", "init_args": {"rank": rank, "silently": silently}}])
    run.environment["PYTHONPATH"] = str(Path(__file__).parent)
    ended = start(tmp_path, *run.command, environment=run.environment, seconds=120)
    assert ended.code not in (None, 0)
    assert silently or f"rank {rank} fails" in ended.output
    assert ended.orphans == []
    at = next(i for i, line in enumerate(ended.output.splitlines()) if "sft -> egspo" in line)
    assert at >= 0  # both ranks were training
