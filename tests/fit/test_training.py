"""EGSPOModule in training: stages, optimizer steps, skipped steps, refused settings."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.testing import assert_close

from egspo_lightning import StageTransition
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.ops.attenuation import ConstantAttenuation
from egspo_lightning.ops.gate import AbsoluteGate, OpenGate, QuantileGate
from egspo_lightning.ops.objective import Objective
from egspo_lightning.types import Stage
from spies import RL, Spy, distance

PURE_RL = {"initial_stage": Stage.EGSPO, "objective": Objective(mu=0.0)}


class FlatReward:
    """The same reward for all completions, so no group has spread."""

    def __call__(self, completions, golds):
        return [1.0 for _ in completions]


def test_stages_follow_one_another_by_epoch(tiny_run):
    spy = Spy()
    run = tiny_run(StageTransition(after_epochs=2), spy, trainer={"max_epochs": 4}).fit()
    stages = [batch.stage for batch in spy.batches]
    assert stages == [Stage.SFT] * 4 + [Stage.EGSPO] * 4  # 2 x 2 steps of 16 rows, then 2 x 2 minibatches
    assert all((batch.rollout is None) == (batch.stage == Stage.SFT) for batch in spy.batches)
    assert all(batch.expert is not None for batch in spy.batches)  # mu > 0: each step has expert data
    assert run.module.stage == Stage.EGSPO
    assert run.data.phases.num_rollout_batches == 2


def test_every_rollout_batch_comes_from_the_current_policy(tiny_run):
    spy = Spy()
    tiny_run(spy, module=RL).fit()
    assert [batch.rollout.policy_version for batch in spy.batches] == [0, 0, 2, 2, 4, 4]


def test_the_first_ratio_is_one_and_later_ones_are_not(tiny_run):
    class Ratios(Callback):
        values = []  # noqa: RUF012

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            stats = pl_module.policy(batch.rollout.input_ids, batch.rollout.completion_mask, pl_module.temperature)
            shift = (stats.logprobs - batch.rollout.old_logprobs).abs()[batch.rollout.completion_mask]
            self.values.append(shift.max().item())

    tiny_run(Ratios(), module=PURE_RL | {"temperature": 0.7}, trainer={"max_epochs": 1}).fit()
    first, second = Ratios.values
    assert first < 1e-5
    assert second > 1e-3


def test_rollouts_at_another_temperature_are_detected(tiny_run, monkeypatch):
    monkeypatch.setattr(EGSPOModule, "takes_sampled_statistics", False)

    class ScoreAtAnother(Callback):
        """Begins after the start probe."""

        def on_train_start(self, trainer, pl_module):
            score = pl_module.score

            def score_at_another(input_ids, completion_mask):
                pl_module.temperature = 0.5
                try:
                    return score(input_ids, completion_mask)
                finally:
                    pl_module.temperature = 1.0

            pl_module.score = score_at_another

    run = tiny_run(ScoreAtAnother(), module=RL)
    with pytest.raises(RuntimeError, match=r"forward pass disagree|samples from another distribution"):
        run.fit()


@pytest.mark.parametrize("is_scored", [True, False])
def test_an_engine_that_samples_from_other_weights_is_detected(tiny_run, monkeypatch, is_scored):
    from egspo_lightning.rollout.transformers_engine import TransformersEngine

    class Stale(TransformersEngine):
        """Samples from scaled weights."""

        def stream(self, lm, requests, sampling, *, eos_ids, pad_id):
            for p in lm.parameters():
                p.mul_(1.5)
            yield from super().stream(lm, requests, sampling, eos_ids=eos_ids, pad_id=pad_id)
            for p in lm.parameters():
                p.div_(1.5)

    message = "it samples from another distribution" if is_scored else "the training forward pass disagrees"
    monkeypatch.setattr(EGSPOModule, "takes_sampled_statistics", not is_scored)
    with pytest.raises(RuntimeError, match=message):
        tiny_run(module=RL, data={"engine": Stale()}).fit()


def test_bf16_true_precision_is_refused(tiny_run):
    with pytest.raises(UserError, match=r"trainer\.precision bf16-true rounds old log-probabilities"):
        tiny_run(trainer={"precision": "bf16-true"}).fit()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"reload_dataloaders_every_n_epochs": 2}, "reload_dataloaders_every_n_epochs must be 1"),
        ({"limit_train_batches": 0.5}, "would end a phase within an optimizer step"),
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, "would end a phase within an optimizer step"),
        ({"overfit_batches": 2}, "would end a phase within an optimizer step"),
    ],
)
def test_trainer_flags_that_cut_a_phase_are_refused(tiny_run, flags, message):
    with pytest.raises(UserError, match=message):
        tiny_run(trainer=flags).fit()


def test_more_tokens_than_positions_are_refused(tiny_run):
    with pytest.raises(UserError, match=r"8 \+ 4090 is more than the 4096 positions"):
        tiny_run(data={"max_completion_length": 4090}).fit()


def test_a_foreign_checkpoint_is_refused(tiny_run, tmp_path):
    import lightning.pytorch as pl

    torch.save({"state_dict": {}, "pytorch-lightning_version": pl.__version__, "epoch": 0}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="was not written by EGSPOModule"):
        tiny_run().fit(ckpt_path=tmp_path / "other.ckpt")


def test_active_tokens_exclude_flat_groups(tiny_run):
    """approx_kl is normalized by them, so flat groups must not shrink it."""

    class Half:
        def __call__(self, completions, golds):
            half = len(completions) // 2
            return [0.0 if i < half else i % 2 for i in range(len(completions))]

    spy = Spy()
    run = tiny_run(spy, module=PURE_RL, data={"reward": Half()}, trainer={"max_epochs": 1}).fit()
    rollout = run.data.phases.rollouts.batch
    sizes = [batch.rollout.update_size for batch in spy.batches]
    assert sum(size.num_active_tokens for size in sizes) == rollout.completion_mask[8:].sum()
    assert sum(size.num_tokens for size in sizes) == rollout.completion_mask.sum()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_rewards_are_refused(tiny_run, value):
    class Broken(FlatReward):
        def __call__(self, completions, golds):
            return [value for _ in completions]

    with pytest.raises(UserError, match=r"data\.reward: Broken \(.*Broken\) gave a reward of float (nan|inf)"):
        tiny_run(module=RL, data={"reward": Broken()}).fit()


def test_a_reward_that_returns_too_few_values_is_refused(tiny_run):
    class Short(FlatReward):
        def __call__(self, completions, golds):
            return super().__call__(completions[1:], golds[1:])

    with pytest.raises(UserError, match=r"Short\) gave 15 rewards for 16 completions"):
        tiny_run(module=RL, data={"reward": Short()}).fit()


def test_invalid_values_of_gate_and_attenuation_are_refused(tiny_run):
    class NoThreshold:
        def threshold(self, entropies):
            return entropies.rows.new_tensor(torch.nan)

    class Negative:
        def phi(self, old_logprobs, entropies, threshold):
            return -torch.ones_like(entropies)

    with pytest.raises(UserError, match=r"model\.gate: NoThreshold gave NaN"):
        tiny_run(module=RL | {"gate": NoThreshold()}).fit()
    with pytest.raises(UserError, match=r"model\.attenuation: Negative gave a weight below 0"):
        tiny_run(module=RL | {"attenuation": Negative()}).fit()


def test_stale_rollouts_are_refused(tiny_run):
    run = tiny_run(module=RL)
    to_batch = run.module.add_advantages_and_gate
    run.module.add_advantages_and_gate = lambda rollout, measurements: to_batch(rollout, measurements)._replace(
        policy_version=7
    )
    with pytest.raises(RuntimeError, match="Stale rollouts: they were sampled by the policy after 7 optimizer steps"):
        run.fit()


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_gradient_accumulation_does_not_change_the_optimizer_step(tiny_run, aggregation):
    spies = []
    for parts in (1, 3, 16):
        spy = Spy()
        tiny_run(
            StageTransition(after_epochs=1),
            spy,
            module={
                "objective": Objective(aggregation=aggregation, mu=0.3, beta=0.05),
                "optimizer": lambda params: torch.optim.SGD(params, lr=0.05),
            },
            trainer={"max_epochs": 2, "accumulate_grad_batches": parts},
        ).fit()
        spies.append(spy)
    whole = spies[0]
    for spy in spies[1:]:
        assert len(spy.gradients) == len(whole.gradients) == 4
        for ours, theirs in zip(spy.gradients, whole.gradients, strict=True):
            assert distance(ours, theirs) < 1e-5
        names = [n for n in whole.metrics[0] if n.startswith(("loss/", "policy/", "gate/", "rollout/"))]
        assert len(names) > 15
        for name in set(names) - {"rollout/tokens_per_second"}:
            assert spy.metrics[0][name] == pytest.approx(whole.metrics[0][name], rel=1e-3, abs=1e-5), name


def test_rollouts_without_spread_change_no_weights(tiny_run):
    spy = Spy()
    run = tiny_run(spy, module=PURE_RL, data={"reward": FlatReward()})
    run.module.configure_model()
    before = [p.detach().clone() for p in run.module.policy.parameters()]
    run.fit()
    assert distance(before, spy.weights[-1]) == 0.0
    assert spy.metrics[0]["policy/skipped_fraction"] == 1.0
    assert spy.metrics[0]["rollout/zero_spread_fraction"] == 1.0


def test_momentum_does_not_change_weights_without_spread(tiny_run):
    class Turning(FlatReward):
        """Has no spread after the first rollout batch."""

        num_rollout_batches = 0

        def __call__(self, completions, golds):
            self.num_rollout_batches += 1
            return [i % 2 if self.num_rollout_batches == 1 else 1.0 for i, _ in enumerate(completions)]

    spy = Spy()
    tiny_run(spy, module=PURE_RL, data={"reward": Turning()}, trainer={"max_epochs": 2}).fit()
    assert distance(*spy.weights) == 0.0
    assert spy.metrics[0]["policy/skipped_fraction"] == 1.0


def test_training_raises_the_reward(tiny_run):
    rewards = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            rewards.append(trainer.datamodule.phases.rollouts.batch.rewards.mean().item())

    tiny_run(
        Watch(),
        module=PURE_RL | {"gate": QuantileGate(0.5), "attenuation": ConstantAttenuation(0.5)},
        data={"num_problems": 8, "num_generations": 8},
        trainer={"max_epochs": 12},
    ).fit()
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


def test_the_threshold_is_that_of_the_whole_rollout_batch(tiny_run):
    spy = Spy()
    run = tiny_run(spy, module=RL | {"gate": QuantileGate(0.25)}, trainer={"max_epochs": 1}).fit()
    rollout = run.data.phases.rollouts.batch
    expected = torch.quantile(rollout.entropies[rollout.completion_mask], 0.75)
    assert rollout.threshold.flatten().tolist() == pytest.approx([expected.item()] * 16, rel=1e-6)
    assert all((batch.rollout.threshold == rollout.threshold[0]).all() for batch in spy.batches)
    assert spy.metrics[0]["gate/high_fraction"] == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(("gate", "fraction"), [(OpenGate(), 1.0), (AbsoluteGate(100.0), 0.0)])
def test_gates_that_open_for_all_or_no_tokens(tiny_run, gate, fraction):
    spy = Spy()
    tiny_run(spy, module=RL | {"gate": gate}, trainer={"max_epochs": 1}).fit()
    assert spy.metrics[0]["gate/high_fraction"] == fraction


def test_the_reference_is_the_policy_at_the_end_of_sft(tiny_run):
    spy = Spy()
    run = tiny_run(
        StageTransition(after_epochs=1), spy, module={"objective": Objective(beta=0.1)}, trainer={"max_epochs": 3}
    ).fit()
    reference = list(run.module.reference.parameters())
    assert distance(reference, spy.weights[0]) == 0.0
    assert distance(reference, spy.weights[-1]) > 0.0
    assert not any(p.requires_grad for p in reference)
    rollouts = [batch.rollout for batch in spy.batches if batch.stage == Stage.EGSPO]
    assert_close(rollouts[0].ref_logprobs, rollouts[0].old_logprobs, rtol=0, atol=1e-5)
    assert spy.metrics[0]["loss/kl"] > 0.0


def test_the_kl_loss_trains_without_spread(tiny_run):
    class Shift(Callback):
        """Moves the policy away from its reference."""

        def on_train_epoch_start(self, trainer, pl_module):
            with torch.no_grad():
                for p in pl_module.policy.parameters():
                    p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))

    spy = Spy()
    module = {"initial_stage": "egspo", "objective": Objective(mu=0.0, beta=1.0)}
    tiny_run(Shift(), spy, module=module, data={"reward": FlatReward()}, trainer={"max_epochs": 1}).fit()
    assert spy.metrics[0]["policy/skipped_fraction"] == 0.0
    assert spy.metrics[0]["loss/kl"] > 0.0
    assert max(g.abs().max() for g in spy.gradients[0]) > 0.0


def test_without_beta_there_is_no_reference(tiny_run):
    run = tiny_run(module=RL, trainer={"max_epochs": 1}).fit()
    assert run.module.reference is None
    assert run.data.phases.rollouts.batch.ref_logprobs is None


def test_bfloat16_autocast_trains(tiny_run):
    spy = Spy()
    tiny_run(StageTransition(after_epochs=1), spy, trainer={"precision": "bf16-mixed", "max_epochs": 2}).fit()
    assert all(torch.isfinite(p).all() for p in spy.weights[-1])
    assert distance(*spy.weights) > 0.0


def test_gradient_checkpointing_samples_the_same_tokens_and_takes_the_same_step(tiny_run, small_model):
    from egspo_lightning.models.policy_config import PolicyConfig

    spies = []
    for checkpointing in (False, True):
        spy = Spy()
        policy = PolicyConfig(small_model, from_scratch=True, gradient_checkpointing=checkpointing)
        tiny_run(spy, module=RL | {"policy": policy}, trainer={"max_epochs": 2}).fit()
        spies.append(spy)
    plain, checkpointed = spies
    assert torch.equal(plain.batches[0].rollout.input_ids, checkpointed.batches[0].rollout.input_ids)
    assert distance(plain.weights[-1], checkpointed.weights[-1]) < 1e-6


def test_runs_are_deterministic_given_the_seed(tiny_run):
    ends = []
    for seed in (1, 1, 2):
        spy = Spy()
        tiny_run(spy, module=RL, data={"seed": seed}).fit()
        ends.append(spy.weights[-1])
    assert distance(ends[0], ends[1]) == 0.0
    assert distance(ends[0], ends[2]) > 0.0


def test_resuming_at_a_phase_boundary_is_bit_identical(tiny_run, tmp_path):
    stages = {"after_epochs": 1, "save_checkpoint": False}
    whole = tiny_run(StageTransition(**stages), trainer={"max_epochs": 4}).fit()
    first = tiny_run(StageTransition(**stages), trainer={"max_epochs": 2}).fit()
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = tiny_run(StageTransition(**stages), trainer={"max_epochs": 4})
    torch.manual_seed(99)  # results must not depend on the global generator
    rest.fit(ckpt_path=tmp_path / "half.ckpt")
    assert rest.data.phases.num_rollout_batches == whole.data.phases.num_rollout_batches == 3
    assert distance(list(whole.module.policy.parameters()), list(rest.module.policy.parameters())) == 0.0
