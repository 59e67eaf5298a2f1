from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from egspo_lightning import MathBenchmark, StageTransition
from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.benchmarks import GeneratedBenchmark
from egspo_lightning.ops.objective import Objective
from egspo_lightning.types import Stage


class StageRecorder(Callback):
    """Records stage, learning rate and optimizer state at the start of each epoch."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.learning_rates: list[float] = []
        self.num_states: list[int] = []
        self.first_batches: list[str] = []

    def on_train_epoch_start(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        self.stages.append(str(pl_module.stage))
        self.learning_rates.append(optimizer.param_groups[0]["lr"])
        self.num_states.append(len(optimizer.state))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.first_batches.append(str(batch.stage))


class LogValues(Callback):
    """Logs one of the given values in each epoch as a metric."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("my/value", self.values[trainer.current_epoch])


SFT, EGSPO = "sft", "egspo"


def test_a_transition_that_no_phase_follows_is_not_printed(tiny_run, capsys):
    run = tiny_run(StageTransition(), trainer={"max_epochs": 1}).fit()
    assert run.module.stage == Stage.EGSPO
    assert "Stage sft ->" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"after_epochs": 1}, [SFT, EGSPO, EGSPO]),
        ({"after_epochs": 2}, [SFT, SFT, EGSPO]),
        ({}, [SFT, EGSPO, EGSPO]),
        ({"monitor": "loss/sft", "target": 0.0}, [SFT] * 3),  # only a metric, whose target is never reached
        ({"enabled": False}, [SFT] * 3),
    ],
)
def test_sft_ends_after_given_epochs(tiny_run, options, expected):
    stages = StageRecorder()
    tiny_run(StageTransition(**options), stages).fit()
    assert stages.stages == stages.first_batches == expected


def test_monitoring_a_benchmark_that_is_never_evaluated_is_refused(tiny_run):
    run = tiny_run(MathBenchmark(), StageTransition(monitor="eval/held_out/avg@1", target=0.5))
    with pytest.raises(UserError, match=r"math_benchmark\.every_n_epochs is 0"):
        run.fit()


def test_patience_counts_only_epochs_with_a_benchmark_evaluation(tiny_run):
    """With an evaluation every second epoch and no improvement, patience 2 ends SFT at the third evaluation."""
    stages = StageRecorder()
    benchmark = GeneratedBenchmark("held_out", num_problems=4, task=ArithmeticTask(num_digits=1))
    tiny_run(
        MathBenchmark(every_n_epochs=2, at_start=False),
        StageTransition(monitor="eval/held_out/avg@1", mode="max", patience=2, min_delta=1.0),
        stages,
        data={"benchmarks": [benchmark]},
        trainer={"max_epochs": 7},
    ).fit()
    assert stages.stages == [SFT] * 6 + [EGSPO]


def test_run_from_sft_ckpt_uses_its_learning_rate_and_resume_keeps_it(tiny_run, tmp_path):
    tiny_run(StageTransition(learning_rate=1e-3), trainer={"max_epochs": 1}, logger=True).fit()
    (start,) = tmp_path.rglob("sft.ckpt")

    def rate(**options):
        run = tiny_run(StageTransition(**options), trainer={"max_epochs": 2}).fit(ckpt_path=start)
        run.trainer.save_checkpoint(tmp_path / "later.ckpt")
        return run.trainer.optimizers[0].param_groups[0]["lr"]

    assert rate(learning_rate=5e-5) == 5e-5
    assert rate() == 1e-2  # the learning rate of the optimizer
    resumed = tiny_run(StageTransition(learning_rate=7e-5), trainer={"max_epochs": 3})
    resumed.fit(ckpt_path=tmp_path / "later.ckpt")
    assert resumed.trainer.optimizers[0].param_groups[0]["lr"] == 1e-2


def test_reference_policy_can_be_added_or_removed_when_starting_from_a_checkpoint(tiny_run, tmp_path):
    plain = tiny_run(StageTransition(), trainer={"max_epochs": 1}, logger=True).fit()
    (start,) = tmp_path.rglob("sft.ckpt")
    with_reference = {"module": {"objective": Objective(beta=0.1)}}
    run = tiny_run(StageTransition(), **with_reference, trainer={"max_epochs": 2}).fit(ckpt_path=start)
    for frozen, current in zip(run.module.reference.parameters(), plain.module.policy.parameters(), strict=True):
        assert torch.equal(frozen, current)
    run.trainer.save_checkpoint(tmp_path / "with.ckpt")
    without = tiny_run(StageTransition(), trainer={"max_epochs": 3}).fit(ckpt_path=tmp_path / "with.ckpt")
    without.trainer.save_checkpoint(tmp_path / "without.ckpt")
    again = tiny_run(StageTransition(), **with_reference, trainer={"max_epochs": 4})
    with pytest.raises(UserError, match="the checkpoint holds no reference policy"):
        again.fit(ckpt_path=tmp_path / "without.ckpt")


def test_stage_never_changes_without_stage_transition(tiny_run):
    stages = StageRecorder()
    tiny_run(stages, trainer={"max_epochs": 2}).fit()
    assert stages.stages == [SFT, SFT]


@pytest.mark.parametrize(
    ("options", "values", "num_sft"),
    [
        ({"target": 0.5}, [0.9, 0.6, 0.4, 0.3, 0.2], 3),
        ({"target": 0.5}, [0.9, 0.5, 0.4, 0.3, 0.2], 2),  # equal to the target
        ({"target": 0.5, "mode": "max"}, [0.1, 0.4, 0.6, 0.7, 0.1], 3),
        ({"patience": 2}, [0.9, 0.8, 0.8, 0.9, 0.1], 4),  # best in epoch 2, then two epochs without improvement
        ({"patience": 1}, [0.9, 0.8, 0.7, 0.75, 0.1], 4),
        ({"patience": 1, "min_delta": 0.2}, [0.9, 0.8, 0.7, 0.6, 0.5], 2),
        ({"patience": 2, "mode": "max"}, [0.5, 0.6, 0.6, 0.6, 0.9], 4),
        ({"patience": 1, "target": 0.85}, [0.9, 0.8, 0.8, 0.8, 0.8], 2),  # the first of the two
        ({"target": 0.0, "after_epochs": 3}, [0.9, 0.9, 0.9, 0.9, 0.9], 3),
    ],
)
def test_monitored_metric_ends_sft(tiny_run, options, values, num_sft):
    stages = StageRecorder()
    transition = StageTransition(**{"after_epochs": None, "monitor": "my/value", **options})
    tiny_run(LogValues(values), transition, stages, trainer={"max_epochs": 5}).fit()
    assert stages.stages == [SFT] * num_sft + [EGSPO] * (5 - num_sft)


def test_training_metric_can_be_monitored(tiny_run):
    stages = StageRecorder()
    tiny_run(StageTransition(None, "loss/sft", target=1e9), stages, trainer={"max_epochs": 2}).fit()
    assert stages.stages == [SFT, EGSPO]


def test_benchmark_metric_can_be_monitored(tiny_run):
    stages = StageRecorder()
    data = {"benchmarks": [GeneratedBenchmark("sums", num_problems=2, task=ArithmeticTask(num_digits=1))]}
    transition = StageTransition(None, "eval/sums/avg@1", mode="max", target=0.0)
    tiny_run(MathBenchmark(every_n_epochs=1), transition, stages, data=data, trainer={"max_epochs": 2}).fit()
    assert stages.stages == [SFT, EGSPO]


def test_unknown_metric_is_refused_with_the_logged_metrics(tiny_run):
    run = tiny_run(StageTransition(monitor="loss/stf", target=0.1))
    with pytest.raises(
        UserError, match=r"stage_transition.monitor: no metric 'loss/stf' was logged.*loss/sft, .*stage"
    ):
        run.fit()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.5}, "need stage_transition.monitor"),
        ({"patience": 2}, "need stage_transition.monitor"),
        ({"monitor": "loss/sft"}, "stage_transition.monitor needs stage_transition.target, .patience, or both"),
        ({"learning_rate": 1e-3, "reset_optimizer": False}, "learning_rate needs stage_transition.reset_optimizer"),
    ],
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        StageTransition(**options)


# Policy, optimizer and schedule after the transition


def test_optimizer_is_reset_with_the_given_learning_rate(tiny_run):
    stages = StageRecorder()
    run = tiny_run(StageTransition(learning_rate=3e-4), stages).fit()
    assert stages.learning_rates == [1e-2, 3e-4, 3e-4]
    # Adam's moments: none at the start, none after the transition, then one entry per parameter
    assert stages.num_states[:2] == [0, 0]
    assert stages.num_states[2] == len(list(run.module.policy.parameters()))
    steps = {int(state["step"]) for state in run.trainer.optimizers[0].state.values()}
    assert steps == {4}  # two rollout batches with two steps each; the SFT steps were reset


def test_learning_rate_of_sft_is_kept_by_default(tiny_run):
    stages = StageRecorder()
    tiny_run(StageTransition(), stages).fit()
    assert stages.learning_rates == [1e-2] * 3


def test_optimizer_state_can_be_kept(tiny_run):
    stages = StageRecorder()
    run = tiny_run(StageTransition(reset_optimizer=False), stages).fit()
    assert stages.num_states[1] == len(list(run.module.policy.parameters()))
    assert {int(state["step"]) for state in run.trainer.optimizers[0].state.values()} == {6}


@pytest.mark.parametrize(("learning_rate", "start"), [(1e-3, 1e-3), (None, 1e-2)])
def test_learning_rate_schedule_restarts(tiny_run, learning_rate, start):
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def halving(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    tiny_run(StageTransition(learning_rate=learning_rate), Rates(), module={"lr_scheduler": halving}).fit()
    # two optimizer steps per epoch, halved after each
    assert rates == pytest.approx([1e-2, 5e-3, start, start / 2, start / 4, start / 8])


def test_policy_at_the_end_of_sft_becomes_the_reference(tiny_run):
    seen: dict[str, list[torch.Tensor]] = {}

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen[str(pl_module.stage)] = [p.detach().clone() for p in pl_module.policy.parameters()]

    run = tiny_run(
        StageTransition(), Look(), module={"objective": Objective(beta=0.1)}, trainer={"max_epochs": 2}
    ).fit()
    reference = list(run.module.reference.parameters())
    assert all(map(torch.equal, reference, seen[EGSPO]))
    assert not all(map(torch.equal, reference, seen[SFT]))
    assert not all(map(torch.equal, reference, run.module.policy.parameters()))


# State and checkpoint


def test_stage_transition_state_is_restored():
    before, after = (StageTransition(None, "x", patience=3) for _ in range(2))
    before.num_epochs, before.num_bad_epochs, before.best = 5, 2, 0.25
    after.load_state_dict(before.state_dict())
    assert (after.num_epochs, after.num_bad_epochs, after.best) == (5, 2, 0.25)
    assert after._judge("x", {"x": torch.tensor(0.3)}) is not None  # the third epoch without improvement


def test_resumed_run_continues_the_epoch_count(tiny_run, tmp_path):
    run = tiny_run(StageTransition(after_epochs=3, save_checkpoint=False), trainer={"max_epochs": 2}).fit()
    run.trainer.save_checkpoint(tmp_path / "two.ckpt")
    stages = StageRecorder()
    resumed = tiny_run(StageTransition(after_epochs=3, save_checkpoint=False), stages, trainer={"max_epochs": 5})
    resumed.fit(ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert stages.stages == [SFT, EGSPO, EGSPO]


def test_sft_ckpt_reproduces_stage_egspo_of_the_run_that_wrote_it(tiny_run):
    whole = tiny_run(StageTransition(learning_rate=1e-3), logger=True).fit()
    assert whole.module.stage == Stage.EGSPO
    checkpoint = Path(whole.trainer.log_dir) / "sft.ckpt"
    assert checkpoint.is_file()
    stages = StageRecorder()
    resumed = tiny_run(StageTransition(learning_rate=1e-3), stages).fit(ckpt_path=checkpoint, weights_only=True)
    assert stages.stages == stages.first_batches == [EGSPO, EGSPO]
    assert stages.learning_rates == [1e-3, 1e-3]
    assert resumed.trainer.global_step == whole.trainer.global_step == 6
    for ours, theirs in zip(resumed.module.policy.parameters(), whole.module.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_disabled_transition_continues_sft_from_sft_ckpt(tiny_run, tmp_path):
    """The stage in the checkpoint belongs to the run that wrote it."""
    tiny_run(StageTransition(after_epochs=2), trainer={"max_epochs": 2}, logger=True).fit()
    (start,) = tmp_path.rglob("sft.ckpt")
    stages = StageRecorder()
    more = tiny_run(StageTransition(enabled=False), stages, trainer={"max_epochs": 4})
    more.fit(ckpt_path=start, weights_only=True)
    assert stages.stages == stages.first_batches == [SFT, SFT]
    assert (more.data.phases.num_passes, more.data.phases.num_rollout_batches, more.trainer.global_step) == (4, 0, 8)
    more.trainer.save_checkpoint(tmp_path / "more.ckpt")
    again = StageRecorder()
    tiny_run(StageTransition(enabled=False), again, trainer={"max_epochs": 5}).fit(ckpt_path=tmp_path / "more.ckpt")
    assert again.stages == [SFT]


def test_continued_sft_equals_one_longer_sft_stage(tiny_run, tmp_path):
    """With an optimizer without state, two plus two epochs equal four epochs."""
    module = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}
    whole = tiny_run(StageTransition(enabled=False), module=module, trainer={"max_epochs": 4}).fit()
    tiny_run(StageTransition(after_epochs=2), module=module, trainer={"max_epochs": 2}, logger=True).fit()
    (start,) = tmp_path.rglob("sft.ckpt")
    more = tiny_run(StageTransition(enabled=False), module=module, trainer={"max_epochs": 4}).fit(ckpt_path=start)
    assert all(map(torch.equal, more.module.policy.parameters(), whole.module.policy.parameters()))


def test_sft_ckpt_can_be_disabled(tiny_run):
    run = tiny_run(StageTransition(save_checkpoint=False), logger=True).fit()
    assert not list(Path(run.trainer.log_dir).glob("*.ckpt"))
