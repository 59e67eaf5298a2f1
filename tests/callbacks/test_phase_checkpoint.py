from copy import deepcopy
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer

from egspo_lightning import PhaseCheckpoint, StageTransition


@pytest.mark.parametrize(("epochs", "saved"), [(3, [2, 3]), (4, [2, 4])])
def test_last_epoch_is_saved_for_any_interval(tiny_run, tmp_path, epochs, saved):
    checkpoint = PhaseCheckpoint(dirpath=tmp_path, every_n_epochs=2, save_top_k=-1, save_last=True)
    run = tiny_run(checkpoint, trainer={"max_epochs": epochs, "enable_checkpointing": True}).fit()
    names = sorted(path.name for path in tmp_path.glob("epoch*.ckpt"))
    assert names == [f"epoch={epoch - 1}-step={2 * epoch}.ckpt" for epoch in saved]
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in run.module.state_dict().items():
        assert torch.equal(last[name], value)


class StopAt(Callback):
    """Tells the trainer to stop after a number of micro-batches."""

    def __init__(self, num_micro_batches: int) -> None:
        self.left = num_micro_batches

    def on_train_batch_end(self, trainer, *args) -> None:
        self.left -= 1
        trainer.should_stop = trainer.should_stop or self.left == 0


class OutOfTime(Callback):
    """Puts Lightning's Timer beyond its limit in the second micro-batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        (timer,) = (callback for callback in trainer.callbacks if isinstance(callback, Timer))
        timer._offset = 3600.0 * batch_idx


class StopAfterPhase(Callback):
    """Tells the trainer to stop after its first phase."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.should_stop = True


ENDS = {
    "max_steps within a phase": ({"max_steps": 3, "max_epochs": -1}, [], 3),
    "max_steps at the end of a phase": ({"max_steps": 4, "max_epochs": -1}, [], 4),
    "max_time": ({"max_time": timedelta(hours=1), "accumulate_grad_batches": 2}, [OutOfTime()], 1),
    "a callback within a phase": ({"max_epochs": 9}, [StopAt(3)], 3),
    "a callback after a phase": ({"max_epochs": 9}, [StopAfterPhase()], 2),
    "a callback within an optimizer step": ({"max_epochs": 9, "accumulate_grad_batches": 2}, [StopAt(5)], 3),
}


@pytest.mark.parametrize("monitor", [None, "policy/skipped_fraction"])
@pytest.mark.parametrize("end", ENDS)
def test_last_checkpoint_is_the_final_policy_whatever_ends_the_run(tiny_run, tmp_path, end, monitor):
    trainer, callbacks, num_steps = deepcopy(ENDS[end])
    checkpoint = PhaseCheckpoint(dirpath=tmp_path, every_n_epochs=5, save_last=True, monitor=monitor, save_top_k=1)
    run = tiny_run(*callbacks, checkpoint, trainer={**trainer, "enable_checkpointing": True}).fit()
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert run.trainer.global_step == last["global_step"] == num_steps
    for name, value in run.module.state_dict().items():
        assert torch.equal(last["state_dict"][name], value)


def test_last_checkpoint_follows_the_interval_whatever_top_k_keeps(tiny_run, tmp_path):
    steps = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            last = tmp_path / "last.ckpt"
            steps.append(torch.load(last, weights_only=True)["global_step"] if last.exists() else None)

    best_at_first = PhaseCheckpoint(dirpath=tmp_path, save_last=True, monitor="stage", mode="min", save_top_k=1)
    tiny_run(Watch(), StageTransition(), best_at_first, trainer={"enable_checkpointing": True}).fit()
    assert steps == [None, 2, 4]
    assert [path.name for path in tmp_path.glob("epoch*.ckpt")] == ["epoch=0-step=2.ckpt"]


def test_last_checkpoint_shares_the_file_of_a_kept_one_and_outlives_it(tiny_run, tmp_path):
    checkpoint = PhaseCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=-1)
    run = tiny_run(checkpoint, trainer={"enable_checkpointing": True, "max_epochs": 1}).fit()
    kept, last = tmp_path / "epoch=0-step=2.ckpt", tmp_path / "last.ckpt"
    assert kept.samefile(last)
    kept.unlink()
    again = tiny_run(
        PhaseCheckpoint(dirpath=tmp_path, save_last=True), trainer={"enable_checkpointing": True, "max_epochs": 2}
    ).fit(ckpt_path=str(last))
    assert (run.trainer.global_step, again.trainer.global_step) == (2, 4)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=1-step=4.ckpt", "last.ckpt"]


@pytest.mark.parametrize("max_steps", [3, 4])
def test_run_that_max_steps_ended_resumes_bit_for_bit(tiny_run, tmp_path, max_steps):
    def run(folder, ckpt_path=None, **trainer):
        checkpoint = PhaseCheckpoint(dirpath=tmp_path / folder, save_last=True)
        parts = tiny_run(StageTransition(), checkpoint, trainer={"enable_checkpointing": True, **trainer})
        return parts.fit(ckpt_path=ckpt_path).module.state_dict()

    whole = run("whole", max_epochs=3)
    run("parts", max_epochs=3, max_steps=max_steps)
    resumed = run("parts", str(tmp_path / "parts" / "last.ckpt"), max_epochs=3)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
