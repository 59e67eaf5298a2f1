"""Resuming from any checkpoint, also from a mid-epoch checkpoint, is bit-identical to an uninterrupted run."""

import csv
import random
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from egspo_lightning import PhaseCheckpoint, StageTransition, TokenRecords
from egspo_lightning.analysis.record_schema import file_of
from egspo_lightning.errors import UserError
from spies import METHODS, slow

STAGES = {"after_epochs": 2}
PHASES = {"max_epochs": 4, "enable_checkpointing": True}
"""Two phases of SFT with 2 optimizer steps each, then two of EGSPO with 4 each."""


class Losses(Callback):
    """Records every loss."""

    def __init__(self):
        self.losses = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[(trainer.current_epoch, batch_idx)] = outputs["loss"].item()


def make_run(tiny_run, folder, losses, *callbacks, module=None, parts=1, max_steps=-1, **checkpoint):
    save = PhaseCheckpoint(dirpath=folder, save_top_k=-1, **(checkpoint or {"every_n_epochs": 1}))
    settings = PHASES | {"accumulate_grad_batches": parts, "logger": CSVLogger(folder), "max_steps": max_steps}
    data = {"num_ppo_epochs": 2}
    return tiny_run(StageTransition(**STAGES), losses, save, *callbacks, module=module, data=data, trainer=settings)


def metrics_of(run):
    """The metrics of each phase by step, without times."""
    with open(Path(run.trainer.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {
        int(row["step"]): {
            name: value
            for name, value in row.items()
            if value and not name.startswith("time/") and "second" not in name
        }
        for row in rows
    }


def weights(run):
    return {name: value.clone() for name, value in run.module.state_dict().items()}


EIGHT_BIT = {"optimizer": lambda params: import_module("bitsandbytes").optim.AdamW8bit(params, lr=1e-2)}


@pytest.mark.parametrize(("method", "parts"), [("egspo", 2), *slow(("egspo", 1), ("ppo", 1), ("kl", 1), ("8bit", 1))])
def test_resuming_from_every_checkpoint_is_bit_identical(tiny_run, tmp_path, method, parts):
    if method == "8bit":
        pytest.importorskip("bitsandbytes", reason='needs bitsandbytes: pip install "egspo-lightning[8bit]"')
    module, whole = (METHODS | {"8bit": EIGHT_BIT})[method], Losses()
    run = make_run(tiny_run, tmp_path / "whole", whole, module=module, parts=parts, every_n_train_steps=1).fit()
    expected = weights(run)
    saved = sorted((tmp_path / "whole").glob("epoch*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))
    assert len(saved) == run.trainer.global_step == 12
    positions = []
    for path in saved[:-1]:
        losses = Losses()
        rest = make_run(tiny_run, tmp_path / path.stem, losses, module=module, parts=parts)
        torch.manual_seed(99)  # results must not depend on the global generator
        rest.fit(ckpt_path=path, weights_only=True)
        assert all(torch.equal(value, expected[name]) for name, value in weights(rest).items()), path.stem
        assert losses.losses == {key: value for key, value in whole.losses.items() if key in losses.losses}
        metrics = metrics_of(rest)
        assert metrics == {step: values for step, values in metrics_of(run).items() if step in metrics}
        assert max(metrics) == 11
        assert rest.trainer.global_step == 12
        positions.append((min(losses.losses), len(losses.losses)))
    assert [count for _, count in positions] == [parts * left for left in range(11, 0, -1)]


@pytest.mark.parametrize("steps", [12, 11], ids=["at the end of a phase", "within a phase"])
def test_resuming_works_with_max_steps(tiny_run, tmp_path, steps):
    """With max_steps Lightning's own restart logic would skip to the next epoch."""
    run = make_run(tiny_run, tmp_path / "whole", Losses(), max_steps=steps, every_n_train_steps=1).fit()
    expected = weights(run)
    saved = list((tmp_path / "whole").glob("epoch*.ckpt"))
    assert len(saved) == run.trainer.global_step == steps
    for path in saved:
        if f"step={steps}" not in path.stem:
            rest = make_run(tiny_run, tmp_path / path.stem, Losses(), max_steps=steps).fit(
                ckpt_path=path, weights_only=True
            )
            assert rest.trainer.global_step == steps, path.stem
            assert all(torch.equal(value, expected[name]) for name, value in weights(rest).items()), path.stem


def test_a_checkpoint_at_the_last_step_of_a_phase_is_saved_after_the_phase(tiny_run, tmp_path):
    make_run(tiny_run, tmp_path / "whole", Losses(), every_n_train_steps=4).fit()
    first, second, third = sorted((tmp_path / "whole").glob("epoch*.ckpt"))
    for path, step in ((first, 4), (second, 8), (third, 12)):
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["global_step"] == step
        assert "phase" not in checkpoint["HybridDataModule"]
        assert checkpoint["egspo"]["metrics"] == [{}]
    assert torch.load(first, weights_only=True)["egspo"]["stage"] == "egspo"  # StageTransition has decided already


def test_global_random_states_resume(tiny_run, tmp_path):
    """A user's reward may use the global generators."""

    class Draw(Callback):
        def __init__(self):
            self.drawn = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            drawn = [random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()]  # noqa: NPY002
            self.drawn.append(drawn)

    whole, rest = Draw(), Draw()
    make_run(tiny_run, tmp_path / "whole", Losses(), whole, every_n_train_steps=1).fit()
    path = next((tmp_path / "whole").glob("*step=7.ckpt"))
    make_run(tiny_run, tmp_path / "rest", Losses(), rest).fit(ckpt_path=path, weights_only=True)
    assert rest.drawn == whole.drawn[7:]
    assert len({tuple(row) for row in whole.drawn}) == len(whole.drawn)


def test_token_records_of_a_resumed_phase_are_equal(tiny_run, tmp_path):
    """They include texts and verdicts, which no tensor holds."""
    records = TokenRecords(every_n_rollout_batches=1)
    whole = make_run(tiny_run, tmp_path / "whole", Losses(), records, every_n_train_steps=1).fit()
    path = next((tmp_path / "whole").glob("*step=6.ckpt"))
    rest = make_run(tiny_run, tmp_path / "rest", Losses(), TokenRecords(every_n_rollout_batches=1))
    rest.fit(ckpt_path=path, weights_only=True)
    for kind, number in (("tokens", 0), ("tokens", 1), ("completions", 0), ("completions", 1)):
        one, other = (pq.read_table(file_of(run.trainer.log_dir, kind, number, 0)) for run in (whole, rest))
        assert one.num_rows > 10
        assert one.equals(other)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"num_minibatches": 1}, "phase of 4 micro-batches per rank, and with this config a phase has 2")],
)
def test_another_number_of_micro_batches_is_refused(tiny_run, tmp_path, change, words):
    make_run(tiny_run, tmp_path / "whole", Losses(), every_n_train_steps=1).fit()
    path = next((tmp_path / "whole").glob("*step=6.ckpt"))
    rest = tiny_run(StageTransition(**STAGES), data={"num_ppo_epochs": 2} | change, trainer=PHASES)
    with pytest.raises(UserError, match=words):
        rest.fit(ckpt_path=path, weights_only=True)


def test_checkpoints_load_with_weights_only(tiny_run, tmp_path):
    make_run(tiny_run, tmp_path, Losses(), every_n_train_steps=1).fit()
    for path in tmp_path.glob("epoch*.ckpt"):
        assert torch.load(path, weights_only=True)["egspo"]["random"][0]["python"]["version"] == 3
