"""Optimizer steps with a non-finite loss or gradient are skipped, counted, saved and replayed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from egspo_lightning import StageTransition
from egspo_lightning.cli.main import main, run
from egspo_lightning.cli.replay import replay
from egspo_lightning.errors import UserError
from processes import TORCHRUN

PROGRAM = Path(__file__).with_name("nonfinite_program.py")


class Poison(Callback):
    """Makes the loss of chosen steps NaN, or their gradient infinite, and records the weights before each step."""

    def __init__(self, steps, what="loss"):
        self.steps, self.what, self.weights, self.number = steps, what, [], 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in module.policy.parameters()]))
        self.bad = self.number in self.steps
        self.number += 1
        self.original = module._sft_step
        if self.bad and self.what == "loss":
            module._sft_step = lambda expert: (self.original(expert)[0] * float("nan"), {})
            module._egspo_step, self.egspo = self._nan_of(module._egspo_step), module._egspo_step

    @staticmethod
    def _nan_of(step):
        def poisoned(*arguments):
            loss, metrics = step(*arguments)
            return loss * float("nan"), metrics

        return poisoned

    def on_after_backward(self, trainer, module):
        if self.bad and self.what == "gradient":
            next(iter(module.policy.parameters())).grad[0, 0] = float("inf")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.bad and self.what == "loss":
            del module._sft_step, module._egspo_step


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_nonfinite_step_is_skipped_and_counted(tiny_run, events, what, clip):
    poison = Poison({1, 9}, what)  # in two phases of eight optimizer steps each
    tiny = tiny_run(
        StageTransition(after_epochs=2),
        poison,
        data={"sft_batch_size": 4},
        trainer={"max_epochs": 4, "gradient_clip_val": clip},
        logger=True,
    ).fit()
    optimizer = tiny.module.optimizers(use_pl_optimizer=False)
    assert all(v.isfinite().all() for state in optimizer.state.values() for v in state.values())
    moved = [not torch.equal(a, b) for a, b in zip(poison.weights, poison.weights[1:], strict=False)]
    assert len(moved) > 16
    assert [number for number, has_moved in enumerate(moved) if not has_moved] == [1, 9]
    assert all(weights.isfinite().all() for weights in poison.weights)
    counts = [event.value for event in events(tiny.trainer).Scalars("fault/nonfinite_updates")]
    assert counts == [1, 2, 2, 2]


def test_adam_does_not_count_a_skipped_step(tiny_run):
    data = {"sft_batch_size": 8}
    one = tiny_run(Poison({0}), data=data, trainer={"max_epochs": 3}, module={"initial_stage": "sft"}).fit()
    states = list(one.module.optimizers(use_pl_optimizer=False).state.values())
    steps = {int(state["step"]) for state in states}
    assert steps == {one.trainer.global_step - 1}


def test_too_many_consecutive_bad_steps_stop_the_run(tiny_run):
    arguments = {"module": {"max_bad_updates": 3}, "data": {"sft_batch_size": 4}, "trainer": {"max_epochs": 4}}
    tiny_run(Poison({0, 1, 3, 4, 6, 7}), **arguments).fit()
    with pytest.raises(UserError, match="3 updates in a row"):
        tiny_run(Poison({1, 2, 3}), **arguments).fit()


def test_a_run_resumes_from_the_checkpoint_of_its_stop(tiny_run, tmp_path):
    """The stored count is at the limit, but only a new bad step may stop the run."""
    arguments = {
        "module": {"max_bad_updates": 1},
        "data": {"sft_batch_size": 4},
        "trainer": {"max_epochs": 1, "accumulate_grad_batches": 2, "default_root_dir": tmp_path},
    }
    with pytest.raises(UserError, match="1 updates in a row"):
        tiny_run(Poison({2}), **arguments).fit()
    (path,) = tmp_path.rglob("nonfinite.ckpt")
    resumed = tiny_run(**arguments).fit(ckpt_path=path, weights_only=True)
    assert resumed.trainer.current_epoch == 1


# From the command line: a token with a NaN embedding, the saved file, and its replay

SHORT = [
    "fit",
    "--config=configs/quickstart.yaml",
    "--trainer.max_epochs=4",
    "--data.demonstrations.init_args.num_demonstrations=16",
    "--data.sft_batch_size=4",
    "--data.benchmarks=null",
    "--data.num_problems=2",
    "--data.num_generations=2",
    "--data.max_completion_length=40",
    "--model.max_bad_updates=2",
    "--hf_export.enabled=false",
]


class BadToken(Callback):
    """Makes the embedding of the digit 7 NaN from the second phase on."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            (token,) = module.tokenizer.encode("7", add_special_tokens=False)
            with torch.no_grad():
                module.policy.lm.get_input_embeddings().weight[token] = float("nan")


@pytest.fixture
def stopped(repository, tmp_path, monkeypatch, capsys):
    """nonfinite.ckpt and the error message of a stopped run."""
    monkeypatch.chdir(repository)
    monkeypatch.setattr("egspo_lightning.cli.main.CALLBACKS", _with(BadToken))
    with pytest.raises(SystemExit) as stop:
        main([*SHORT, f"--trainer.default_root_dir={tmp_path}", "--stage_transition.enabled=false"])
    output = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in output
    (path,) = tmp_path.rglob("nonfinite.ckpt")
    return path, output


def _with(callback):
    from egspo_lightning.cli.main import CALLBACKS

    return CALLBACKS | {"bad_token": callback}


def test_the_message_names_the_batch_and_the_replay_names_the_tokens(stopped, capsys):
    path, message = stopped
    for words in ("2 updates in a row", "micro-batch 1 of the phase (stage sft, 4 rows, loss nan)", f"replay {path}"):
        assert words in message
    main(["replay", str(path)])
    out = capsys.readouterr().out
    assert "loss nan (in training nan)" in out
    assert "policy.lm.model.embed_tokens.weight" in out
    assert "weights that are not finite: 1" in out
    assert "row 0, position" in out
    assert "logprob is nan" in out


def test_replay_computes_the_loss_of_training(tiny_run, repository, tmp_path, monkeypatch):
    """A finite batch is declared bad, so that both losses can be compared, in both stages."""
    monkeypatch.chdir(repository)
    for stage in ("sft", "egspo"):
        arguments = [*SHORT, f"--trainer.default_root_dir={tmp_path / stage}", f"--model.initial_stage={stage}"]
        with monkeypatch.context() as patch:
            patch.setattr("egspo_lightning.training.nonfinite_updates.FiniteUpdates.judge", _always_bad)
            with pytest.raises(UserError, match="in a row"):
                run(arguments)
        (path,) = (tmp_path / stage).rglob("nonfinite.ckpt")
        lines = replay(path)
        loss = next(line for line in lines if line.startswith("loss "))
        computed, trained = loss.removeprefix("loss ").rstrip(")").split(" (in training ")
        assert float(computed) == pytest.approx(float(trained), rel=1e-4, abs=1e-6)
        assert "tokens that are not finite: 0" in lines


def _always_bad(self, parameters, total, *, scaled):
    self.bad_micro_batch, self.micro_batches = self.micro_batches[0], []
    self.num_bad, self.num_in_a_row = self.num_bad + 1, self.num_in_a_row + 1
    return True


def test_replay_refuses_a_checkpoint_without_a_bad_micro_batch(tiny_run, tmp_path, capsys):
    tiny = tiny_run(trainer={"max_epochs": 1}).fit()
    tiny.trainer.save_checkpoint(tmp_path / "good.ckpt")
    with pytest.raises(SystemExit) as stop:
        main(["replay", str(tmp_path / "good.ckpt")])
    assert stop.value.code == 2
    assert "holds no micro-batch that was not finite" in capsys.readouterr().err


@pytest.mark.slow
def test_all_ranks_skip_a_step_that_is_bad_on_one_rank(tmp_path):
    command = [sys.executable, *TORCHRUN, str(PROGRAM)]
    done = subprocess.run(
        [*command, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["num_bad"] == second["num_bad"] == 1
    assert first["weights"] == second["weights"]
    assert first["moved"] == second["moved"]
    assert first["moved"].count(False) == 1
    assert len(first["moved"]) > 3
