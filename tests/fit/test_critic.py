"""The critic in training: warm-up, initialization, learning rate, checkpoints."""

import itertools
import math

import pytest
import torch
from lightning.pytorch import Callback

from egspo_lightning import StageTransition
from egspo_lightning.errors import UserError
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.estimators import GAE, ReinforcePlusPlus
from egspo_lightning.ops.objective import Objective
from egspo_lightning.training.adaptive_coefficients import KLReward
from egspo_lightning.types import Stage

TRUNKS = ["shared", "own"]


def ppo(trunk, *, mu=0.0, **options):
    return {"objective": Objective(mu=mu), "advantage": GAE(), "critic": CriticConfig(trunk, **options)}


def decaying(params):
    """AdamW with weight decay, which moves every parameter that has a gradient."""
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def copies(parameters):
    return [p.detach().clone() for p in parameters]


def equal(some, others):
    return all(map(torch.equal, some, others))


class Steps(Callback):
    """Records policy and critic before each optimizer step and at the end, and the stage of each step."""

    def __init__(self, head=None):
        self.policy, self.critic, self.stages, self.head = [], [], [], head

    def on_train_start(self, trainer, pl_module):
        if self.head is not None:
            part = pl_module.critic or pl_module.policy
            torch.nn.init.constant_(part.value_head.linear.weight, self.head)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.stages.append(batch.stage)
        self._record(pl_module)

    def on_train_end(self, trainer, pl_module):
        self._record(pl_module)

    def _record(self, module):
        critic = module.policy.value_head if module.critic is None else module.critic
        self.policy.append(copies(module.policy.lm.parameters()))
        self.critic.append(copies(critic.parameters()))

    def moved(self, which):
        weights = getattr(self, which)
        return [not equal(before, after) for before, after in itertools.pairwise(weights)]


@pytest.mark.parametrize("trunk", TRUNKS)
def test_values_start_at_zero_and_learn_the_return(tiny_run, trunk):
    seen = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            rollout = trainer.datamodule.phases.rollouts.batch
            error = (rollout.old_values - rollout.returns)[rollout.completion_mask].square().mean().item()
            seen.append((rollout.old_values.clone(), error, dict(trainer.callback_metrics)))

    run = tiny_run(Look(), module=ppo(trunk, clip=None) | {"initial_stage": "egspo"}, trainer={"max_epochs": 6}).fit()
    assert (run.module.critic is None) == (trunk == "shared")
    values, error, metrics = seen[0]
    assert not values.any()
    assert metrics["value/mean"] == 0.0
    assert metrics["loss/value"] > 0.0
    assert seen[-1][0].any()
    assert seen[-1][1] < error / 4


@pytest.mark.parametrize("trunk", TRUNKS)
def test_only_the_critic_is_trained_in_its_warm_up(tiny_run, trunk):
    """SFT momentum, weight decay and expert data do not move the policy either."""
    steps = Steps()
    tiny_run(
        StageTransition(reset_optimizer=False),
        steps,
        module=ppo(trunk, mu=0.5, warmup_steps=3) | {"optimizer": decaying},
    ).fit()
    assert steps.stages == [Stage.SFT] * 2 + [Stage.EGSPO] * 4
    assert steps.moved("policy") == [True, True, False, False, False, True]
    assert steps.moved("critic")[2:] == [True] * 4


@pytest.mark.parametrize("trunk", TRUNKS)
def test_sft_does_not_move_the_critic(tiny_run, trunk):
    steps = Steps(head=0.3)  # weight decay would not move a weight of 0
    tiny_run(
        StageTransition(after_epochs=2), steps, module=ppo(trunk) | {"optimizer": decaying}, trainer={"max_epochs": 2}
    ).fit()
    assert steps.moved("policy") == [True] * 4
    assert steps.moved("critic")[:3] == [False] * 3


def test_a_separate_critic_starts_from_the_policy_at_the_end_of_sft(tiny_run):
    seen = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            policy, critic = pl_module.policy.lm.get_decoder(), pl_module.critic.trunk
            seen.append(equal(critic.parameters(), policy.parameters()))
            if pl_module.stage == Stage.SFT:  # undo the copy made before the first step
                with torch.no_grad():
                    next(critic.parameters()).add_(1.0)

    run = tiny_run(StageTransition(), Look(), module=ppo("own")).fit()
    assert seen == [True, True, False]
    assert not {id(p) for p in run.module.critic.parameters()} & {id(p) for p in run.module.policy.parameters()}


def test_a_critic_of_another_model_keeps_its_own_weights(tiny_run, tiny_model):
    options = {"model": PolicyConfig(tiny_model, from_scratch=True)}
    steps = Steps()
    run = tiny_run(StageTransition(), steps, module=ppo("own", warmup_steps=1, **options)).fit()
    assert run.module.critic.value_head.linear.in_features > run.module.policy.lm.config.hidden_size
    assert steps.moved("critic") == [False, False, True, True, True, True]


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize(
    ("of_stage", "of_critic", "expected"),
    [
        (3e-4, 5e-3, [(1e-2, 5e-3), (3e-4, 5e-3)]),
        (None, 5e-3, [(1e-2, 5e-3), (1e-2, 5e-3)]),
        (3e-4, None, [(1e-2, 1e-2), (3e-4, 3e-4)]),
    ],
)
def test_a_critic_keeps_its_learning_rate(tiny_run, trunk, of_stage, of_critic, expected):
    rates = []

    class Rates(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            rates.append(tuple(group["lr"] for group in trainer.optimizers[0].param_groups))

    tiny_run(
        StageTransition(learning_rate=of_stage),
        Rates(),
        module=ppo(trunk, learning_rate=of_critic),
        trainer={"max_epochs": 2},
    ).fit()
    assert rates == expected


@pytest.mark.parametrize("trunk", TRUNKS)
def test_gradient_accumulation_does_not_change_the_critic(tiny_run, trunk):
    ends = []
    for parts in (1, 3):
        steps = Steps(head=0.1)
        plain = {"initial_stage": "egspo", "optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}
        run = tiny_run(
            steps,
            module=ppo(trunk) | plain,
            trainer={"max_epochs": 2, "accumulate_grad_batches": parts},
        ).fit()
        ends.append((steps.policy[-1] + steps.critic[-1], run.trainer.callback_metrics))
    (whole, metrics), (split, others) = ends
    for ours, theirs in zip(split, whole, strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    names = [name for name in metrics if name.startswith(("value/", "loss/"))]
    assert {"loss/value", "value/moved_fraction", "value/explained_variance"} <= set(names)
    for name in names:
        assert float(others[name]) == pytest.approx(float(metrics[name]), rel=1e-3, abs=1e-5), name


def test_another_critic_model_needs_its_own_trunk():
    with pytest.raises(UserError, match=r"model\.critic\.model .* model\.critic\.trunk is shared"):
        CriticConfig(model=PolicyConfig("other"))


# Checkpoints

METHODS = {
    "ppo": ppo("shared", warmup_steps=1),
    "ppo_critic": ppo("own", warmup_steps=1),
    "kl_reward": {"advantage": ReinforcePlusPlus(), "kl_reward": KLReward(0.1)},
    "beta": {"objective": Objective(beta=0.1)},
}


@pytest.fixture
def sft_ckpt(tiny_run, tmp_path):
    """The sft.ckpt of a run without critic and reference."""
    tiny_run(StageTransition(), trainer={"max_epochs": 1}, logger=True).fit()
    (start,) = tmp_path.rglob("sft.ckpt")
    return start


@pytest.mark.parametrize("name", METHODS)
def test_any_sft_ckpt_starts_any_method(tiny_run, sft_ckpt, name):
    """A run with these networks from the start equals a run that gets them at the end of SFT."""
    whole = tiny_run(StageTransition(), module=METHODS[name]).fit()
    resumed = tiny_run(StageTransition(), module=METHODS[name]).fit(ckpt_path=sft_ckpt, weights_only=True)
    assert resumed.trainer.global_step == whole.trainer.global_step == 6
    theirs = whole.module.state_dict()
    assert resumed.module.state_dict().keys() == theirs.keys()
    for key, value in resumed.module.state_dict().items():
        assert torch.equal(value, theirs[key]), key
    metrics = {key: float(value) for key, value in resumed.trainer.callback_metrics.items()}
    assert all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize("name", METHODS)
def test_resuming_with_these_networks_is_bit_identical(tiny_run, tmp_path, name):
    whole = tiny_run(StageTransition(), module=METHODS[name], trainer={"max_epochs": 4}).fit()
    first = tiny_run(StageTransition(), module=METHODS[name], trainer={"max_epochs": 3}).fit()
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = tiny_run(StageTransition(), module=METHODS[name], trainer={"max_epochs": 4})
    rest.fit(ckpt_path=tmp_path / "half.ckpt")
    for key, value in rest.module.state_dict().items():
        assert torch.equal(value, whole.module.state_dict()[key]), key


@pytest.fixture
def checkpoint(tiny_run, tmp_path):
    """Makes a checkpoint of a run with the given module."""

    def make(module, max_epochs):
        run = tiny_run(StageTransition(after_epochs=2), module=module, trainer={"max_epochs": max_epochs}).fit()
        run.trainer.save_checkpoint(tmp_path / "some.ckpt")
        return tmp_path / "some.ckpt"

    return make


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ppo", ["model.critic is set", "holds no critic", "sft.ckpt", "leave it out"]),
        ("ppo_critic", ["model.critic is set", "holds no critic", "sft.ckpt", "leave it out"]),
        ("kl_reward", ["model.kl_reward is set", "holds no reference policy", "sft.ckpt", "leave kl_reward out"]),
        ("beta", ["model.objective.beta is above 0", "holds no reference policy", "sft.ckpt", "set beta to 0"]),
    ],
)
def test_a_checkpoint_of_stage_egspo_must_hold_all_networks(tiny_run, checkpoint, name, words):
    path = checkpoint({}, 3)
    with pytest.raises(UserError) as refusal:
        tiny_run(StageTransition(after_epochs=2), module=METHODS[name]).fit(ckpt_path=path)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(("saved", "loaded", "max_epochs"), [("ppo", {}, 3), ("ppo_critic", {}, 3), ({}, "ppo", 1)])
def test_an_optimizer_of_other_parameters_is_refused(tiny_run, checkpoint, saved, loaded, max_epochs):
    """Resuming would drop moments: the critic's in stage EGSPO, the policy's in stage SFT."""
    path = checkpoint(METHODS.get(saved, {}) if saved else {}, max_epochs)
    run = tiny_run(StageTransition(after_epochs=2), module=METHODS[loaded] if loaded else {})
    with pytest.raises(UserError, match=r"ckpt_path: the optimizer in the checkpoint has .*Start from sft\.ckpt"):
        run.fit(ckpt_path=path)


@pytest.mark.parametrize(("saved", "loaded"), [("ppo", {}), ({}, "ppo_critic"), ({}, "beta")])
def test_evaluation_loads_the_policy_without_the_other_networks(tiny_run, checkpoint, saved, loaded):
    from egspo_lightning.data.tasks.arithmetic import ArithmeticTask
    from egspo_lightning.evaluation.benchmarks import GeneratedBenchmark

    path = checkpoint(METHODS[saved] if saved else {}, 3)
    benchmarks = [GeneratedBenchmark("sums", num_problems=2, task=ArithmeticTask(num_digits=1))]
    run = tiny_run(module=METHODS[loaded] if loaded else {}, data={"benchmarks": benchmarks})
    run.trainer.test(run.module, run.data, ckpt_path=path)
    weights = torch.load(path, weights_only=True)["state_dict"]
    for key, value in run.module.policy.lm.state_dict().items():
        assert torch.equal(value, weights[f"policy.lm.{key}"]), key
