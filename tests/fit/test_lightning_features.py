"""Lightning's callbacks, schedules and flags: each trains both stages as it should, or is refused before training."""

from functools import partial
from inspect import isclass

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelSummary,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from torch.optim import lr_scheduler as schedules
from torch.testing import assert_close

from egspo_lightning import StageTransition
from egspo_lightning.cli.main import run
from egspo_lightning.errors import UserError
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.module import EGSPOModule
from egspo_lightning.ops.estimators import GAE
from egspo_lightning.types import Stage
from spies import RL, Spy, distance


class NoTraining(Callback):
    """Fails when training starts."""

    def on_train_start(self, trainer, pl_module):
        pytest.fail("training has started")


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (GradientAccumulationScheduler({0: 2}), r"set trainer\.accumulate_grad_batches"),
        (GradientAccumulationScheduler({2: 2}), r"set trainer\.accumulate_grad_batches"),
        (StochasticWeightAveraging(1e-3, swa_epoch_start=1), "Use EMAWeightAveraging or WeightAveraging"),
        (StochasticWeightAveraging(1e-3, swa_epoch_start=3), "Use EMAWeightAveraging or WeightAveraging"),
        (BatchSizeFinder(batch_arg_name="sft_batch_size"), r"Set data\.max_tokens_per_micro_batch"),
        (EarlyStopping("rollout/accuracy"), "Set its strict to false"),
        (LearningRateFinder(attr_name="temperature"), r"Set the learning rates by model\.optimizer"),
    ],
)
def test_callbacks_that_cannot_keep_their_meaning_are_refused(tiny_run, callback, message):
    with pytest.raises(UserError, match=message):
        tiny_run(StageTransition(), callback, NoTraining()).fit()


# Schedules

RATE = 1e-4


class Rates(Callback):
    """Records the learning rate of each optimizer step."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def halving(step):
    return 0.5**step


def warmup_then(optimizer, schedule):
    """Two steps of warm-up, then another schedule."""
    warmup = schedules.LinearLR(optimizer, start_factor=0.5, total_iters=2)
    return schedules.SequentialLR(optimizer, [warmup, schedule(optimizer)], milestones=[2])


def chained(optimizer):
    parts = [schedules.ConstantLR(optimizer, total_iters=2), schedules.ExponentialLR(optimizer, gamma=0.9)]
    return schedules.ChainedScheduler(parts, optimizer)


KEPT = {
    "LambdaLR": partial(schedules.LambdaLR, lr_lambda=halving),
    "MultiplicativeLR": partial(schedules.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "StepLR": partial(schedules.StepLR, step_size=2),
    "MultiStepLR": partial(schedules.MultiStepLR, milestones=[1, 3]),
    "ConstantLR": partial(schedules.ConstantLR, total_iters=2),
    "LinearLR": partial(schedules.LinearLR, start_factor=0.1, total_iters=4),
    "ExponentialLR": partial(schedules.ExponentialLR, gamma=0.9),
    "SequentialLR": partial(warmup_then, schedule=partial(schedules.CosineAnnealingLR, T_max=4)),
    "PolynomialLR": partial(schedules.PolynomialLR, total_iters=4),
    "CosineAnnealingLR": partial(schedules.CosineAnnealingLR, T_max=4, eta_min=1e-6),
    "ChainedScheduler": chained,
    "CosineAnnealingWarmRestarts": partial(schedules.CosineAnnealingWarmRestarts, T_0=2),
}
REFUSED = {
    "OneCycleLR": partial(schedules.OneCycleLR, max_lr=1e-3, total_steps=20),
    "CyclicLR": partial(schedules.CyclicLR, base_lr=1e-4, max_lr=1e-3),
    "SequentialLR": partial(
        warmup_then, schedule=partial(schedules.CyclicLR, base_lr=1e-4, max_lr=1e-3, cycle_momentum=False)
    ),
    "CosineAnnealingLR": partial(schedules.CosineAnnealingLR, T_max=4, eta_min=1e-3),
}
BASES = {"LRScheduler", "_LRScheduler", "ReduceLROnPlateau"}
"""Not a schedule of its own, or refused by ``build_scheduler``."""


def test_every_schedule_of_torch_is_tried():
    found = {
        name for name, value in vars(schedules).items() if isclass(value) and issubclass(value, schedules.LRScheduler)
    }
    assert found - BASES == set(KEPT) | set(REFUSED)


@pytest.mark.parametrize("name", KEPT)
def test_the_schedule_of_stage_egspo_starts_from_its_own_rate(tiny_run, name):
    spy = Rates()
    tiny_run(StageTransition(learning_rate=RATE), spy, module={"lr_scheduler": KEPT[name]}).fit()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule, rates = KEPT[name](optimizer), []
    for _ in range(4):  # 2 rollout batches of 2 optimizer steps
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert_close(spy.rates[2:], rates, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_a_rate_that_the_schedule_would_replace_is_refused(tiny_run, name):
    run = tiny_run(StageTransition(learning_rate=RATE), NoTraining(), module={"lr_scheduler": REFUSED[name]})
    with pytest.raises(UserError, match=rf"learning_rate = 0\.0001 has no effect with model\.lr_scheduler {name}"):
        run.fit()


@pytest.mark.parametrize("name", REFUSED)
def test_a_critics_rate_that_the_schedule_would_replace_is_refused(tiny_run, name):
    critic = {"critic": CriticConfig(learning_rate=RATE), "advantage": GAE()}
    run = tiny_run(NoTraining(), module=critic | {"lr_scheduler": REFUSED[name]})
    with pytest.raises(UserError, match=rf"critic\.learning_rate = 0\.0001 has no effect with .* {name}"):
        run.fit()


def test_a_schedule_may_set_the_rates_of_policy_and_critic(tiny_run):
    spy, schedule = Rates(), partial(schedules.OneCycleLR, max_lr=[1e-3, 1e-2], total_steps=20)
    critic = {"critic": CriticConfig("own"), "advantage": GAE(), "lr_scheduler": schedule}
    run = tiny_run(StageTransition(), spy, module=critic, trainer={"max_epochs": 2}).fit()
    rates = [group["lr"] for group in run.trainer.optimizers[0].param_groups]
    assert rates[1] == pytest.approx(10 * rates[0])


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_schedules_that_set_the_rate_train_both_stages(tiny_run, name):
    spy = Rates()
    tiny_run(StageTransition(), spy, module={"lr_scheduler": REFUSED[name]}).fit()
    assert_close(spy.rates[:2], spy.rates[2:4])  # the schedule starts anew
    assert len(spy.rates) == 6


# Callbacks and flags that keep their meaning


@pytest.mark.parametrize(
    "callback",
    [
        LearningRateMonitor(),
        DeviceStatsMonitor(),
        Timer("00:01:00:00"),
        ModelSummary(2),
        GradientAccumulationScheduler({0: 1}),
        EarlyStopping("loss/sft", patience=9),
        EarlyStopping("rollout/reward_mean", patience=9, strict=False),
        EMAWeightAveraging(decay=0.5, update_starting_at_step=99),
    ],
)
def test_callbacks_that_observe_leave_training_as_it_is(tiny_run, callback):
    plain, spy = Spy(), Spy()
    tiny_run(StageTransition(), plain, logger=True).fit()
    tiny_run(StageTransition(), callback, spy, logger=True).fit()
    assert distance(plain.weights[-1], spy.weights[-1]) == 0


@pytest.mark.parametrize(("callback", "shares"), [(EMAWeightAveraging(decay=0.5), None), (WeightAveraging(), 1 / 6)])
def test_weights_are_averaged_over_both_stages(tiny_run, callback, shares):
    class Steps(Callback):
        weights = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.weights.append(next(pl_module.policy.parameters()).detach().clone())

    Steps.weights.clear()
    module = tiny_run(StageTransition(), callback, Steps()).fit().module
    expected = Steps.weights[0]
    for number, weight in enumerate(Steps.weights[1:], start=2):
        expected = torch.lerp(expected, weight, 0.5 if shares is None else 1 / number)
    assert len(Steps.weights) == 6
    assert_close(next(module.policy.parameters()).detach(), expected, rtol=1e-5, atol=1e-6)


def test_early_stopping_on_a_rollout_metric_works_from_the_start_of_stage_egspo(tiny_run):
    run = tiny_run(EarlyStopping("rollout/accuracy", patience=9), StageTransition(), module=RL).fit()
    assert run.data.phases.num_rollout_batches == run.trainer.current_epoch == 3


@pytest.mark.parametrize(
    ("flags", "num_steps"),
    [
        ({}, 6),
        ({"max_steps": 3, "max_epochs": -1}, 3),
        ({"max_time": "00:01:00:00"}, 6),
        ({"limit_train_batches": 1}, 3),
        ({"fast_dev_run": True}, 2),
        ({"fast_dev_run": 2}, 4),
        ({"fast_dev_run": 2, "accumulate_grad_batches": 2}, 2),
        ({"deterministic": True}, 6),
        ({"profiler": "simple"}, 6),
        ({"profiler": "advanced"}, 6),
        ({"detect_anomaly": True}, 6),
        ({"barebones": True, "log_every_n_steps": None}, 6),
        ({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, 6),
    ],
)
def test_flags_reach_stage_egspo(tiny_run, flags, num_steps):
    spy = Spy()
    tiny = tiny_run(StageTransition(after_epochs=1), spy, trainer=flags).fit()
    assert tiny.trainer.global_step == len(spy.gradients) == num_steps
    assert [spy.batches[0].stage, spy.batches[-1].stage] == [Stage.SFT, Stage.EGSPO]


@pytest.mark.parametrize("flags", [{"overfit_batches": 0.5}, {"fast_dev_run": 1, "accumulate_grad_batches": 2}])
def test_flags_that_cut_an_optimizer_step_are_refused(tiny_run, flags):
    with pytest.raises(UserError, match="within an optimizer step"):
        tiny_run(StageTransition(), NoTraining(), trainer=flags).fit()


def test_fast_dev_run_ends_sft_after_one_epoch(tiny_run):
    spy = Spy()
    tiny_run(StageTransition(after_epochs=5), spy, trainer={"fast_dev_run": True}).fit()
    assert [batch.stage for batch in spy.batches] == [Stage.SFT, Stage.EGSPO]


def test_barebones_is_accepted_on_the_command_line(repository, tmp_path):
    cli = run(
        [
            "fit",
            f"--config={repository}/configs/quickstart.yaml",
            "--trainer.barebones=true",
            "--trainer.max_steps=1",
            "--data.benchmarks=null",
            "--hf_export.enabled=false",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    assert cli.trainer.barebones
    assert cli.trainer.global_step == 1


def test_load_from_checkpoint_says_what_to_do_instead(tmp_path):
    with pytest.raises(UserError, match=r"EGSPOModule\.load_from_checkpoint: .* Build EGSPOModule"):
        EGSPOModule.load_from_checkpoint(tmp_path / "last.ckpt")
