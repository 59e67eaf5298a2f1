"""Parts of other methods in training, compared with values computed in the tests."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from torch.testing import assert_close

from egspo_lightning import StageTransition
from egspo_lightning.errors import UserError
from egspo_lightning.ops.attenuation import ConstantAttenuation
from egspo_lightning.ops.estimators import GroupRelative, LeaveOneOut, ReinforcePlusPlus
from egspo_lightning.ops.expert_methods import HPT
from egspo_lightning.ops.gate import OpenGate, QuantileGate
from egspo_lightning.ops.objective import Objective
from egspo_lightning.ops.schedules import ChordMu
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.length import SoftLengthPenalty
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.training.adaptive_coefficients import EntropyBonus, KLReward
from egspo_lightning.types import Stage

PURE_RL = {"initial_stage": "egspo", "objective": Objective(mu=0.0)}
FROZEN = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}


class Phases(Callback):
    """Records the metrics, rollouts, batches and gradients of every phase."""

    def __init__(self):
        self.metrics, self.rollouts, self.batches, self.gradients = [], [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.batches.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches[-1].append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in pl_module.policy.parameters()])

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.rollouts.append(trainer.datamodule.phases.rollouts)


class EvenSumsAreFlat:
    """1 for problems with an even answer, else the share of even bytes."""

    def __call__(self, completions, golds):
        return [
            1.0 if int(gold) % 2 == 0 else sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1)
            for text, gold in zip(completions, golds, strict=True)
        ]


def even_share(completions, golds):
    return [sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1) for text in completions]


def is_flat(problem):
    return int(problem.answer) % 2 == 0


def groups(rollouts, size=4):
    return [rollouts.completions[i : i + size] for i in range(0, len(rollouts.completions), size)]


# Dynamic sampling


@pytest.mark.parametrize("max_resampling", [0, 1, 3])
def test_flat_groups_are_resampled_and_remaining_ones_are_skipped(tiny_run, max_resampling):
    phases = Phases()
    data = {"reward": EvenSumsAreFlat(), "max_resampling": max_resampling, "num_ppo_epochs": 2}
    run = tiny_run(phases, module=PURE_RL, data=data).fit()
    position = 0  # in the endless order of the problems
    total_resampled = total_skipped = 0
    for metrics, rollouts, batches in zip(phases.metrics, phases.rollouts, phases.batches, strict=True):
        places = run.data.problems.draw(position, 4)
        position += 4
        num_resampled = num_flat_seen = 0
        for _ in range(max_resampling):
            flat = [place for place in range(4) if is_flat(places[place])]
            fresh = run.data.problems.draw(position, len(flat))
            position += len(flat)
            num_resampled += len(flat)
            for place, problem in zip(flat, fresh, strict=True):
                places[place] = problem
        assert [group[0].problem for group in groups(rollouts)] == places
        num_left = sum(map(is_flat, places))
        num_flat_seen = num_left + num_resampled
        assert metrics["rollout/resampled_groups"] == num_resampled
        assert metrics["rollout/flat_groups"] == num_left
        assert metrics["rollout/zero_spread_fraction"] == pytest.approx(num_flat_seen / (4 + num_resampled))
        lengths = rollouts.batch.completion_mask.view(4, 4, -1).sum((1, 2)).tolist()
        active = sum(length for length, problem in zip(lengths, places, strict=True) if not is_flat(problem))
        trained = sum(int(batch.rollout.completion_mask.sum()) for batch in batches)
        assert trained == 2 * active  # two PPO epochs
        assert sum(batch.rollout.update_size.num_tokens for batch in batches) == 2 * sum(lengths)
        total_resampled, total_skipped = total_resampled + num_resampled, total_skipped + num_left
    assert run.data.state_dict()["num_drawn"] == position
    assert (total_resampled > 0) == (max_resampling > 0)
    assert total_skipped > 0 or max_resampling == 3


def test_resuming_keeps_the_position_in_the_problems(tiny_run, tmp_path):
    options = {"module": PURE_RL, "data": {"reward": EvenSumsAreFlat(), "max_resampling": 2}}
    whole_phases, rest_phases = Phases(), Phases()
    whole = tiny_run(whole_phases, **options, trainer={"max_epochs": 4}).fit()
    first = tiny_run(**options, trainer={"max_epochs": 2}).fit()
    assert first.data.state_dict()["num_drawn"] > 8  # some groups were resampled
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = tiny_run(rest_phases, **options, trainer={"max_epochs": 4}).fit(ckpt_path=tmp_path / "half.ckpt")
    assert rest.data.state_dict() == whole.data.state_dict()
    for ours, theirs in zip(rest_phases.rollouts, whole_phases.rollouts[2:], strict=True):
        assert ours.completions == theirs.completions
    for ours, theirs in zip(rest.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# LUFFY


@pytest.mark.parametrize("parts", [1, 3])
def test_expert_solutions_join_the_rollouts(tiny_run, parts):
    phases = Phases()
    run = tiny_run(
        phases,
        module=PURE_RL | {"advantage": GroupRelative(scale_by_std=False), "gate": QuantileGate(0.3)},
        data={"expert_fraction": 0.5, "num_ppo_epochs": 3},
        trainer={"max_epochs": 2, "accumulate_grad_batches": parts},
    ).fit()
    for number, (rollouts, batches) in enumerate(zip(phases.rollouts, phases.batches, strict=True)):
        rollout, completions = rollouts.batch, rollouts.completions
        assert rollout.is_expert.tolist() == [False] * 16 + [True] * 2  # half of 4 problems, after the samples
        solutions = run.data.phases.pool.solutions(2 * number, 2)
        for i, (problem, token_ids) in enumerate(solutions):
            assert completions[16 + i].problem == completions[4 * i].problem == problem
            row = rollout.input_ids[16 + i][rollout.completion_mask[16 + i]].tolist()
            assert row == completions[16 + i].token_ids == token_ids
            assert row[-1] == run.module.tokenizer.eos_token_id
            even = sum(byte % 2 == 0 for byte in token_ids[:-1]) / (len(token_ids) - 1)
            group = torch.tensor([completion.reward for completion in completions[4 * i : 4 * i + 4]])
            assert completions[16 + i].reward == pytest.approx(even)
            advantage = rollout.advantages[16 + i][rollout.completion_mask[16 + i]]
            assert_close(advantage, torch.full_like(advantage, even - group.mean().item()), rtol=0, atol=1e-6)
            sampled = rollout.advantages[4 * i : 4 * i + 4].sum(-1) / rollout.completion_mask[4 * i : 4 * i + 4].sum(-1)
            assert_close(sampled, group - group.mean(), rtol=0, atol=1e-6)
        own = rollout.completion_mask[:16]
        tau = torch.quantile(rollout.entropies[:16][own], 0.7)
        assert_close(rollout.threshold, tau.expand(18, 1), rtol=1e-6, atol=0)
        # each expert row is in one minibatch per PPO epoch; the minibatch alternates between epochs
        for epoch in range(3):
            for minibatch in range(2):
                start = (epoch * 2 + minibatch) * parts
                micro = [batch.rollout for batch in batches[start : start + parts]]
                firsts = [row for m in micro for row in m.input_ids[m.is_expert & m.completion_mask.any(-1)].tolist()]
                (place,) = [i for i in range(2) if (i + epoch) % 2 == minibatch]
                width = len(firsts[0])
                assert firsts == [rollout.input_ids[16 + place, :width].tolist()]
                sizes = {m.update_size for m in micro}
                (size,) = sizes
                tokens = sum(int(m.completion_mask.sum()) for m in micro)
                expert_tokens = len(solutions[place].token_ids)
                assert (size.num_active_tokens, size.num_sampled_tokens) == (tokens, tokens - expert_tokens)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_the_number_of_expert_rows(tiny_run, fraction, count):
    run = tiny_run(module=PURE_RL, data={"expert_fraction": fraction}, trainer={"max_epochs": 1}).fit()
    assert run.data.phases.rollouts.batch.is_expert.sum() == count
    assert run.data.state_dict()["num_drawn"] == 4 - count


def test_the_loss_with_an_expert_by_hand(tiny_run):
    """Ratios are 1 at the first step, so the loss is -A on sampled tokens and -A p / (p + gamma) on expert tokens."""
    phases = Phases()
    objective = Objective(mu=0.0, expert_shaping=0.3)
    tiny_run(
        phases,
        module=PURE_RL | FROZEN | {"objective": objective, "gate": OpenGate(), "advantage": LeaveOneOut()},
        data={"expert_fraction": 0.5, "num_minibatches": 1},
        trainer={"max_epochs": 1},
    ).fit()
    rollout = phases.rollouts[0].batch
    p = rollout.old_logprobs.exp()
    per_token = torch.where(rollout.is_expert[:, None], p / (p + 0.3), 1.0) * -rollout.advantages
    expected = per_token[rollout.completion_mask].sum() / rollout.completion_mask.sum()
    assert phases.metrics[0]["loss/egspo"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    expert = rollout.is_expert
    assert rollout.advantages[expert].abs().sum() > 0
    assert_close(  # the mean of the group excludes the expert
        rollout.advantages[expert].sum(-1) / rollout.completion_mask[expert].sum(-1),
        rollout.rewards[expert] - rollout.rewards[:8].view(2, 4).mean(-1),
    )


def test_experts_train_groups_without_spread(tiny_run):
    """Sampled rows are skipped, expert rows are not."""

    class Flat:
        def __call__(self, completions, golds):
            return [float("boxed" in text) for text in completions]

    phases = Phases()
    tiny_run(phases, module=PURE_RL, data={"reward": Flat(), "expert_fraction": 1.0}, trainer={"max_epochs": 1}).fit()
    metrics, rollouts = phases.metrics[0], phases.rollouts[0]
    assert metrics["rollout/zero_spread_fraction"] == 1.0
    assert metrics["rollout/flat_groups"] == 0.0
    assert metrics["policy/skipped_fraction"] == 0.0
    assert rollouts.batch.advantages[16:].amax(-1).tolist() == [1.0] * 4
    trained = [batch.rollout for batch in phases.batches[0]]
    assert all(rollout.is_expert.all() for rollout in trained)
    assert sum(rollout.input_ids.shape[0] for rollout in trained) == 4
    assert metrics["rollout/reward_mean"] == 0.0  # without expert rows
    assert all(max(g.abs().max() for g in gradients) > 0 for gradients in phases.gradients)


def test_advantages_without_expert_support_are_refused(tiny_run):
    run = tiny_run(module=PURE_RL | {"advantage": ReinforcePlusPlus()}, data={"expert_fraction": 0.5})
    with pytest.raises(UserError, match=r"data\.expert_fraction = 0\.5 .* model\.advantage"):
        run.fit()


@pytest.mark.parametrize(
    ("fraction", "surrogate", "message"),
    [
        (0.5, "nll", r"data\.expert_fraction .* got 0\.5"),
        (1.0, "shaped", r"model\.objective\.expert_surrogate .* got shaped"),
    ],
)
def test_hpt_needs_sft_on_a_demonstration_of_each_problem(tiny_run, fraction, surrogate, message):
    module = {"advantage": HPT(), "objective": Objective(mu=0.0, expert_surrogate=surrogate)}
    with pytest.raises(UserError, match=message):
        tiny_run(module=module, data={"expert_fraction": fraction}).fit()


# Truncated completions


class TruncatesEveryThird(TransformersEngine):
    """Marks every third completion as truncated."""

    def stream(self, lm, requests, sampling, *, eos_ids, pad_id):
        for batch in super().stream(lm, requests, sampling, eos_ids=eos_ids, pad_id=pad_id):
            yield [(i, sample._replace(is_truncated=i % 3 == 0)) for i, sample in batch]


TRUNCATED = torch.tensor([i % 3 == 0 for i in range(16)])


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("masked", [True, False])
def test_masked_truncated_completions_count_nowhere(tiny_run, masked, aggregation):
    phases = Phases()
    objective = Objective(mu=0.0, mask_truncated=masked, aggregation=aggregation)
    parts = {"gate": QuantileGate(0.4), "attenuation": ConstantAttenuation(0.25), "objective": objective}
    tiny_run(
        phases,
        module=PURE_RL | FROZEN | parts,
        data={"engine": TruncatesEveryThird(), "num_minibatches": 1},
        trainer={"max_epochs": 1},
    ).fit()
    (rollouts,), (metrics,) = phases.rollouts, phases.metrics
    rollout, ((batch,),) = rollouts.batch, phases.batches
    lengths = torch.tensor([len(completion.token_ids) for completion in rollouts.completions])
    kept = ~TRUNCATED if masked else torch.ones(16, dtype=torch.bool)
    assert rollout.completion_mask.sum(-1).tolist() == lengths.tolist()
    assert rollout.loss_mask.sum(-1).tolist() == (lengths * kept).tolist()
    size = batch.rollout.update_size
    assert (size.num_tokens, size.num_sequences) == (lengths[kept].sum(), kept.sum())
    assert size.num_active_tokens == batch.rollout.completion_mask.sum() == lengths[kept].sum()

    # rewards of truncated completions still enter the baseline of their group
    rewards = torch.tensor([completion.reward for completion in rollouts.completions]).view(4, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)).flatten()
    assert_close(rollout.advantages.sum(-1), advantages * lengths * kept, rtol=0, atol=1e-4)

    entropies = [rollout.entropies[row][rollout.loss_mask[row]] for row in range(16) if kept[row]]
    pooled = torch.cat(entropies)
    tau = torch.quantile(pooled, 0.6)
    assert metrics["gate/threshold"] == pytest.approx(tau.item(), rel=1e-6)
    weights = [torch.where(row >= tau, 1.0, 0.25) for row in entropies]
    assert metrics["gate/high_fraction"] == pytest.approx((pooled >= tau).float().mean().item())
    assert metrics["gate/weight_sum"] == pytest.approx(torch.cat(weights).sum().item(), rel=1e-5)
    assert metrics["policy/entropy"] == pytest.approx(pooled.mean().item(), rel=1e-5)

    per_row = torch.stack([-(w * a).sum() for w, a in zip(weights, advantages[kept], strict=True)])
    expected = {
        "token-mean": per_row.sum() / lengths[kept].sum(),
        "seq-mean-token-mean": (per_row / lengths[kept]).mean(),
        "seq-mean-token-sum-norm": per_row.mean() / 18,
    }[aggregation]
    assert metrics["loss/egspo"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert metrics["rollout/truncated_fraction"] == pytest.approx(6 / 16)  # logged in either case


def test_a_fully_truncated_rollout_batch_changes_no_weights(tiny_run):
    class CutsAll(TransformersEngine):
        def stream(self, lm, requests, sampling, **kwargs):
            for batch in super().stream(lm, requests, sampling, **kwargs):
                yield [(i, sample._replace(is_truncated=True)) for i, sample in batch]

    phases = Phases()
    run = tiny_run(
        phases,
        module=PURE_RL | {"objective": Objective(mu=0.0, mask_truncated=True)},
        data={"engine": CutsAll()},
        trainer={"max_epochs": 1},
    )
    run.module.configure_model()
    before = [p.detach().clone() for p in run.module.policy.parameters()]
    run.fit()
    assert all(map(torch.equal, before, run.module.policy.parameters()))
    assert phases.metrics[0]["policy/skipped_fraction"] == 1.0
    assert all(map(math.isfinite, phases.metrics[0].values()))
    assert "policy/entropy" not in phases.metrics[0]  # a mean over no token, not 0


def test_the_length_penalty_reaches_the_rewards(tiny_run):
    phases = Phases()
    reward = WeightedReward({"even": even_share, "length": SoftLengthPenalty(10)}, {"length": 0.5})
    tiny_run(phases, module=PURE_RL, data={"reward": reward}, trainer={"max_epochs": 1}).fit()
    (rollouts,) = phases.rollouts
    for completion, reward in zip(rollouts.completions, rollouts.batch.rewards, strict=True):
        even = sum(ord(c) % 2 == 0 for c in completion.text) / max(len(completion.text), 1)
        off = 0.5 * max(len(completion.token_ids) - 8, 0) / 10
        assert reward.item() == pytest.approx(even - off, abs=1e-6)


# CHORD


@pytest.mark.parametrize("parts", [1, 2])
def test_mu_follows_the_optimizer_steps_of_stage_egspo(tiny_run, parts):
    phases = Phases()
    schedule = ChordMu(warmup_steps=2, decay_steps=4, peak=0.8, valley=0.2)
    tiny_run(
        StageTransition(after_epochs=2),
        phases,
        module={"objective": Objective(mu=schedule)},
        trainer={"max_epochs": 6, "accumulate_grad_batches": parts},
    ).fit()
    falling = [0.2 + 0.6 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    by_step = [0.0, 0.4, *falling, 0.2, 0.2]
    found = [metrics["policy/mu"] for metrics in phases.metrics[2:]]
    assert found == pytest.approx([(by_step[i] + by_step[i + 1]) / 2 for i in range(0, 8, 2)])
    for batches in phases.batches[2:]:
        assert all(batch.expert is not None and batch.stage == Stage.EGSPO for batch in batches)
        assert sum(int(batch.expert.completion_mask.any(-1).sum()) for batch in batches) == 2 * 4
    assert "policy/mu" not in phases.metrics[1]


def test_mu_resumes(tiny_run, tmp_path):
    options = {"module": {"objective": Objective(mu=ChordMu(decay_steps=6))}}
    whole, rest = Phases(), Phases()
    tiny_run(StageTransition(), whole, **options, trainer={"max_epochs": 4}).fit()
    first = tiny_run(StageTransition(), **options, trainer={"max_epochs": 3}).fit()
    first.trainer.save_checkpoint(tmp_path / "some.ckpt")
    tiny_run(StageTransition(), rest, **options, trainer={"max_epochs": 4}).fit(ckpt_path=tmp_path / "some.ckpt")
    assert rest.metrics[-1]["policy/mu"] == whole.metrics[-1]["policy/mu"] < 0.5


@pytest.mark.parametrize(("schedule", "has_expert"), [(ChordMu(peak=0.0, valley=0.0), False), (ChordMu(), True)])
def test_batches_have_expert_data_if_mu_is_ever_positive(tiny_run, schedule, has_expert):
    phases = Phases()
    module = {"initial_stage": "egspo", "objective": Objective(mu=schedule)}
    tiny_run(phases, module=module, trainer={"max_epochs": 1}).fit()
    assert [batch.expert is not None for batch in phases.batches[0]] == [has_expert] * 2


# Parts with state

STATEFUL = {
    "gate": lambda: QuantileGate(0.3, running_decay=0.9),
    "kl_reward": lambda: KLReward(0.05, target=0.01, horizon=20),
    "entropy_bonus": lambda: EntropyBonus(0.01, target=1.0, step=0.004),
}


def stateful_parts():
    return {"objective": Objective(mu=0.0), "advantage": ReinforcePlusPlus()} | {k: v() for k, v in STATEFUL.items()}


def test_stateful_parts_resume_exactly(tiny_run, tmp_path):
    whole_phases, rest_phases = Phases(), Phases()
    stages = {"save_checkpoint": False}
    whole = tiny_run(StageTransition(**stages), whole_phases, module=stateful_parts(), trainer={"max_epochs": 5}).fit()
    first = tiny_run(StageTransition(**stages), module=stateful_parts(), trainer={"max_epochs": 3}).fit()
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = first.module.advantage_and_gate.state_dict()
    assert state["token_weights"]["state"]["gate"]["state"]["running"] > 0.0
    assert state["kl_reward"]["state"]["current"] != 0.05
    assert state["entropy_bonus"]["state"]["current"] != 0.01
    rest = tiny_run(StageTransition(**stages), rest_phases, module=stateful_parts(), trainer={"max_epochs": 5})
    assert rest.module.advantage_and_gate.state_dict() != state
    rest.fit(ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for ours, theirs in zip(rest.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert rest.module.advantage_and_gate.state_dict() == whole.module.advantage_and_gate.state_dict()
    for ours, theirs in zip(rest_phases.metrics, whole_phases.metrics[3:], strict=True):
        for name in ("gate/threshold", "rollout/kl_coefficient", "policy/entropy_coefficient", "rollout/kl"):
            assert ours[name] == theirs[name], name


def test_a_part_of_another_class_starts_with_new_state(tiny_run, tmp_path):
    first = tiny_run(module=stateful_parts() | {"initial_stage": "egspo"}, trainer={"max_epochs": 2}).fit()
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    module = stateful_parts() | {"initial_stage": "egspo", "gate": OpenGate(), "entropy_bonus": None}
    rest = tiny_run(module=module, trainer={"max_epochs": 2}).fit(ckpt_path=tmp_path / "half.ckpt")
    saved = first.module.advantage_and_gate.state_dict()
    assert rest.module.advantage_and_gate.state_dict() == {
        "kl_reward": saved["kl_reward"],
        "token_weights": {"class": "EntropyGate", "state": {}},
    }


def test_the_running_threshold_by_hand(tiny_run):
    phases = Phases()
    module = PURE_RL | {"gate": QuantileGate(0.3, running_decay=0.75)}
    tiny_run(phases, module=module, trainer={"max_epochs": 3}).fit()
    running = None
    for metrics, rollouts in zip(phases.metrics, phases.rollouts, strict=True):
        rollout = rollouts.batch
        latest = torch.quantile(rollout.entropies[rollout.completion_mask], 0.7).item()
        running = latest if running is None else 0.75 * running + 0.25 * latest
        assert metrics["gate/threshold"] == pytest.approx(running, rel=1e-6)


def test_the_entropy_bonus_raises_entropy_to_its_target(tiny_run):
    """Rewards are flat, so only the bonus changes the policy."""

    class Flat:
        def __call__(self, completions, golds):
            return [1.0 for _ in completions]

    phases = Phases()
    tiny_run(
        StageTransition(after_epochs=4),
        phases,
        module={"objective": Objective(mu=0.0), "entropy_bonus": EntropyBonus(0.0, target=5.0, step=0.5)},
        data={"reward": Flat()},
        trainer={"max_epochs": 9},
    ).fit()
    metrics = phases.metrics[4:]
    entropies = [m["policy/entropy"] for m in metrics]
    assert entropies[0] < 5.0
    assert entropies[-1] > entropies[0]
    expected: list[float] = []  # the entropy of each rollout batch sets its coefficient
    for entropy in entropies:
        expected.append(max((expected[-1] if expected else 0.0) + (0.5 if entropy < 5.0 else -0.5), 0.0))
    assert [m["policy/entropy_coefficient"] for m in metrics] == pytest.approx(expected)
    assert metrics[0]["policy/skipped_fraction"] == 0.0  # rows with advantage 0 are not skipped


def test_the_entropy_bonus_enters_the_loss(tiny_run):
    phases = Phases()
    module = PURE_RL | FROZEN | {"entropy_bonus": EntropyBonus(0.25), "gate": OpenGate()}
    tiny_run(phases, module=module, data={"num_minibatches": 1}, trainer={"max_epochs": 1}).fit()
    (metrics,), (rollouts,) = phases.metrics, phases.rollouts
    mean = rollouts.batch.entropies[rollouts.batch.completion_mask].mean().item()
    assert metrics["loss/entropy"] == pytest.approx(mean, rel=1e-4)
    assert metrics["loss/total"] == pytest.approx(metrics["loss/egspo"] - 0.25 * mean, rel=1e-4)


def test_the_kl_in_the_reward(tiny_run):
    """REINFORCE++ with a KL penalty: whitened advantages, and no KL term in the loss."""
    phases = Phases()
    module = {"objective": Objective(mu=0.0), "advantage": ReinforcePlusPlus(), "kl_reward": KLReward(0.5)}
    tiny_run(StageTransition(), phases, module=module, trainer={"max_epochs": 3}).fit()
    rollout, metrics = phases.rollouts[-1].batch, phases.metrics[-1]
    assert rollout.ref_logprobs is None  # the loss does not need them
    assert metrics["rollout/kl_coefficient"] == 0.5
    assert metrics["rollout/kl"] != 0.0
    assert phases.metrics[1]["rollout/kl"] == pytest.approx(0.0, abs=1e-6)  # the reference still equals the policy
    assert "loss/kl" not in metrics
    values = rollout.advantages[rollout.completion_mask]
    assert values.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert values.std().item() == pytest.approx(1.0, abs=1e-2)
