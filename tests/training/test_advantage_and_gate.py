"""AdvantageAndGate: results do not depend on the number of ranks, and state carries over to the next rollout batch."""

import io

import pytest
import torch
from torch.testing import assert_close

from egspo_lightning.errors import UserError
from egspo_lightning.ops.advantages import gae, reinforce_plus_plus
from egspo_lightning.ops.attenuation import ConstantAttenuation
from egspo_lightning.ops.estimators import GAE, Estimate, GroupRelative, LeaveOneOut, ReinforcePlusPlus, token_rewards
from egspo_lightning.ops.gate import AbsoluteGate, OpenGate, QuantileGate
from egspo_lightning.ops.objective import Objective
from egspo_lightning.ops.token_methods import TokenWeights
from egspo_lightning.training.adaptive_coefficients import EntropyBonus, KLReward

EXACT = {"rtol": 1e-12, "atol": 1e-12}
TENSORS = (
    "input_ids",
    "completion_mask",
    "old_logprobs",
    "entropies",
    "ref_logprobs",
    "old_values",
    "advantages",
    "returns",
    "rewards",
    "is_expert",
    "is_truncated",
    "groups",
    "members",
    "threshold",
    "is_high",
    "high_weights",
    "low_weights",
    "weight_scale",
)


@pytest.fixture
def convert(on_ranks):
    """Converts scored rollouts to rollout batches on each rank, in sequence; returns the results of the last."""

    def run(make, *rollouts):
        gatings = [make() for _ in rollouts[0]]

        def work(rank, number):
            return [gatings[number].apply(parts[number], rank) for parts in rollouts]

        return [results[-1] for results in on_ranks(work, range(len(gatings)))], gatings

    return run


def join(rollouts, name, num_sampled):
    """Join a field of several ranks as one rank orders it: all sampled rows, then all expert rows."""
    values = [getattr(rollout, name) for rollout in rollouts]
    if values[0] is None:
        return None
    own = [value[:n] for value, n in zip(values, num_sampled, strict=True)]
    return torch.cat(own + [value[n:] for value, n in zip(values, num_sampled, strict=True)])


@pytest.mark.parametrize("advantage", [GroupRelative(), LeaveOneOut(), ReinforcePlusPlus(0.9), GAE(0.99, 0.9)])
@pytest.mark.parametrize(
    "gate",
    [
        lambda: QuantileGate(0.3),
        lambda: QuantileGate(0.3, over="sequence"),
        lambda: QuantileGate(0.3, running_decay=0.5),
        lambda: AbsoluteGate(0.7),
        OpenGate,
    ],
)
@pytest.mark.parametrize("at", [1, 2])
def test_two_ranks_give_the_results_of_one_rank(make_scored, split_scored, make_gating, convert, advantage, gate, at):
    def make():
        return make_gating(
            objective=Objective(rescale_weights=True, beta=0.1, mask_truncated=True),
            gate=gate(),
            advantage=advantage,
            kl_reward=KLReward(coefficient=0.2, target=0.1, horizon=100),
            entropy_bonus=EntropyBonus(coefficient=0.01, target=0.5),
        )

    experts = (2, 0, 1) if hasattr(advantage, "estimate_expert") else ()
    wholes = [
        make_scored(seed=seed, num_problems=3, expert_groups=experts, with_reference=True, with_values=True)
        for seed in (1, 2)
    ]
    wholes = [whole._replace(is_truncated=torch.arange(len(whole.rewards)) % 5 == 3) for whole in wholes]
    parts = [split_scored(whole, at) for whole in wholes]
    if experts:  # expert rows come in the order of the ranks
        order = torch.tensor([*range(12), *(12 + i for i in ([1, 0, 2] if at == 1 else [1, 2, 0]))])
    else:
        order = torch.arange(12)
    ((whole, expected_metrics),), (one_rank,) = convert(make, *([whole] for whole in wholes))
    results, gatings = convert(make, *parts)
    num_sampled = [part.num_sampled for part in parts[0]]
    for name in TENSORS:
        shared, expected = join([r for r, _ in results], name, num_sampled), getattr(whole, name)
        if expected is None:
            assert shared is None
        else:
            assert_close(shared, expected[order], **EXACT, msg=name)
    for _, metrics in results:
        assert set(metrics) == set(expected_metrics)
        for name in set(expected_metrics) - {"time/gate"}:
            assert metrics[name].item() == pytest.approx(expected_metrics[name].item(), abs=1e-5), name
    for gating in gatings:
        assert gating.kl_reward.current == pytest.approx(one_rank.kl_reward.current, rel=1e-6)
        assert gating.kl_reward.current != 0.2
        assert gating.entropy_bonus.current == one_rank.entropy_bonus.current
        gates = [a.token_weights.gate for a in (gating, one_rank)]
        if hasattr(gates[0], "state_dict"):
            ours, expected = (gate.state_dict()["running"] for gate in gates)
            assert ours == (expected if expected is None else pytest.approx(expected, rel=1e-12))


def test_rescaled_weights_average_to_one_over_all_ranks(make_scored, split_scored, make_gating, convert):
    objective = Objective(rescale_weights=True)
    for at in (1, 2):
        results, _ = convert(lambda: make_gating(objective=objective), split_scored(make_scored(num_problems=3), at))
        weights = []
        for rollout, _ in results:
            weight = (rollout.high_weights + rollout.low_weights) * rollout.weight_scale
            weights.append(weight[rollout.sampled_mask])
        assert torch.cat(weights).mean().item() == pytest.approx(1.0, abs=1e-12)
        assert all(abs(part.mean().item() - 1) > 1e-3 for part in weights)
        assert results[0][1]["gate/weight_mean"].item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("at", [None, 1, 4])
def test_a_fifth_of_the_tokens_is_high_where_most_entropies_are_zero(
    make_scored, split_scored, make_gating, convert, at
):
    whole = make_scored(num_problems=20)
    kept = torch.rand(whole.completion_mask.shape, generator=torch.Generator().manual_seed(0)) < 0.05
    whole = whole._replace(scores=whole.scores._replace(entropies=whole.scores.entropies * kept))
    parts = [whole] if at is None else split_scored(whole, at)
    results, _ = convert(lambda: make_gating(gate=QuantileGate(0.2)), parts)
    num_tokens = int(whole.completion_mask.sum())
    for _, metrics in results:
        assert metrics["gate/high_fraction"].item() == pytest.approx(0.2, abs=1 / num_tokens)
        assert metrics["gate/tied_fraction"].item() == pytest.approx(0.8, abs=1 / num_tokens)
        assert metrics["gate/threshold"].item() == 0.0
    high = sum(int(rollout.is_high.sum()) for rollout, _ in results)
    assert high == round(metrics["gate/high_fraction"].item() * num_tokens)
    assert all((rollout.high_weights == rollout.is_high).all() for rollout, _ in results)


class Half(TokenWeights):
    """Weights without a gate: 1/2 everywhere, infinite outside the mask."""

    def weights(self, tokens):
        return torch.where(tokens.mask, 0.5, torch.inf)


def test_token_weights_without_a_gate(make_scored, make_gating, convert):
    ((rollout, metrics),), _ = convert(lambda: make_gating(token_weights=Half()), [make_scored()])
    mask = rollout.completion_mask
    assert torch.equal(rollout.high_weights, 0.5 * mask)
    assert not rollout.low_weights.any()
    assert torch.equal(rollout.is_high, mask)
    assert (metrics["gate/high_fraction"].item(), metrics["gate/weight_mean"].item()) == (1.0, 0.5)
    assert "gate/threshold" not in metrics


class Twos(TokenWeights):
    """Integer weights."""

    def weights(self, tokens):
        return torch.full(tokens.mask.shape, 2)


def test_integer_token_weights_become_floats(make_scored, make_gating, convert):
    ((rollout, metrics),), _ = convert(lambda: make_gating(token_weights=Twos()), [make_scored()])
    assert rollout.high_weights.dtype == torch.float64
    assert metrics["gate/weight_mean"].item() == 2.0


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.ones(3), "Given must give weights of shape"), (-1.0, "weight below 0"), (torch.nan, "weight below 0")],
)
def test_token_weights_of_wrong_shape_or_value_are_refused(make_scored, make_gating, convert, value, message):
    class Given(TokenWeights):
        def weights(self, tokens):
            return value if isinstance(value, torch.Tensor) else torch.full_like(tokens.logprobs, value)

    with pytest.raises(UserError, match=f"model.token_weights: Given.*{message.removeprefix('Given ')}"):
        convert(lambda: make_gating(token_weights=Given()), [make_scored()])


def test_weight_scale_without_rescaling_is_one(make_rollout):
    rollout, _ = make_rollout()
    assert torch.equal(rollout.weight_scale, torch.ones(8, 1, dtype=torch.float64))


@pytest.mark.parametrize("idle", [0, 1])
def test_rank_without_tokens_gets_threshold_of_the_other(make_scored, split_scored, make_gating, convert, idle):
    parts = split_scored(make_scored(with_values=True), 1)
    parts[idle] = parts[idle]._replace(completion_mask=torch.zeros_like(parts[idle].completion_mask))
    for advantage in (ReinforcePlusPlus(), GAE()):
        objective = Objective(rescale_weights=True)

        def make(objective=objective, advantage=advantage):
            return make_gating(objective=objective, advantage=advantage)

        results, _ = convert(make, parts)
        ((one_rank, _),), _ = convert(make, [parts[1 - idle]])
        assert_close(results[1 - idle][0].advantages, one_rank.advantages, **EXACT)
        for name in ("threshold", "weight_scale"):
            shared = [getattr(rollout, name).unique() for rollout, _ in results]
            assert_close(shared[0], shared[1], **EXACT)
            assert_close(shared[0], getattr(one_rank, name).unique(), **EXACT)
        assert not results[idle][0].advantages.any()


def test_rollout_batch_without_tokens_has_zero_advantages_and_no_state_change(make_scored, make_gating, convert):
    nothing = make_scored(with_reference=True, with_values=True)
    nothing = nothing._replace(completion_mask=torch.zeros_like(nothing.completion_mask))
    for advantage in (GroupRelative(), ReinforcePlusPlus(), GAE()):
        ((rollout, metrics),), (gating,) = convert(
            lambda advantage=advantage: make_gating(
                objective=Objective(rescale_weights=True),
                advantage=advantage,
                kl_reward=KLReward(coefficient=0.2, target=0.1),
                entropy_bonus=EntropyBonus(coefficient=0.01, target=0.5),
            ),
            [nothing],
        )
        assert not rollout.advantages.any()
        assert rollout.weight_scale.unique().tolist() == [1.0]
        assert all(value.isfinite() for value in metrics.values())
        assert (gating.kl_reward.current, gating.entropy_bonus.current) == (0.2, 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_equal_those_of_the_pure_functions(make_scored, make_gating, convert, dtype):
    scored = make_scored(with_values=True, with_reference=True, dtype=dtype)
    mask, scores = scored.completion_mask, scored.scores
    penalty = 0.2 * (scores.logprobs - scores.ref_logprobs)
    rewards = token_rewards(scored.rewards, mask, penalty)
    advantages, returns = gae(rewards, scores.values, mask, gamma=0.9, lam=0.8)
    kl_reward = KLReward(coefficient=0.2)
    ((rollout, metrics),), _ = convert(lambda: make_gating(advantage=GAE(0.9, 0.8), kl_reward=kl_reward), [scored])
    assert rollout.advantages.dtype == rollout.threshold.dtype == rollout.weight_scale.dtype == dtype
    assert_close(rollout.advantages, advantages)
    assert_close(rollout.returns, returns)
    assert metrics["rollout/kl"].item() == pytest.approx(penalty[mask].mean().item() / 0.2, abs=1e-6)
    assert metrics["rollout/kl_coefficient"].item() == pytest.approx(0.2)
    ((other, _),), _ = convert(lambda: make_gating(advantage=ReinforcePlusPlus(0.9), kl_reward=kl_reward), [scored])
    assert_close(other.advantages, reinforce_plus_plus(rewards, mask, gamma=0.9))


def test_masked_truncated_completions_still_count_for_their_group(make_scored, make_gating, convert):
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    scored = make_scored(rewards=rewards)
    scored = scored._replace(is_truncated=torch.arange(8) == 1)
    results = [
        convert(lambda masked=masked: make_gating(objective=Objective(mask_truncated=masked)), [scored])[0][0][0]
        for masked in (False, True)
    ]
    for rollout, masked in zip(results, (False, True), strict=True):
        assert rollout.completion_mask[1].any()
        assert rollout.loss_mask[1].any() != masked
        assert rollout.advantages[1].any() != masked
        first = scored.completion_mask[0].nonzero()[0].item()
        assert rollout.advantages[0, first].item() == pytest.approx(1.5, abs=1e-5)
    kept = torch.cat([scored.scores.entropies[b][scored.completion_mask[b]] for b in range(8) if b != 1])
    assert results[1].threshold[0].item() == pytest.approx(torch.quantile(kept, 0.7).item(), abs=1e-12)
    assert results[0].threshold[0].item() != results[1].threshold[0].item()


def test_adaptive_coefficients_after_two_rollout_batches_by_hand(make_scored, make_gating, convert):
    scored = make_scored(with_reference=True)
    mask = scored.completion_mask
    scores = scored.scores._replace(ref_logprobs=(scored.scores.logprobs - 0.11) * mask, entropies=0.4 * mask.double())
    scored = scored._replace(scores=scores)  # KL 0.11 per token, 10 % above the target; 8 of 80 completions
    ((_, metrics),), (gating,) = convert(
        lambda: make_gating(
            kl_reward=KLReward(coefficient=0.2, target=0.1, horizon=80),
            entropy_bonus=EntropyBonus(coefficient=0.01, target=0.5, step=0.002),
        ),
        [scored],
        [scored],
    )
    assert metrics["rollout/kl"].item() == pytest.approx(0.11, abs=1e-6)
    assert metrics["rollout/kl_coefficient"].item() == pytest.approx(0.2 * 1.01, abs=1e-6)
    assert gating.kl_reward.current == pytest.approx(0.2 * 1.01**2, abs=1e-6)
    assert metrics["policy/entropy_coefficient"].item() == pytest.approx(0.014, abs=1e-6)
    assert gating.entropy_bonus.current == pytest.approx(0.014, abs=1e-9)


def test_state_resumes_through_a_checkpoint(make_scored, make_gating, convert):
    def make():
        return make_gating(
            gate=QuantileGate(0.3, running_decay=0.5),
            kl_reward=KLReward(coefficient=0.2, target=0.1, horizon=100),
            entropy_bonus=EntropyBonus(coefficient=0.01, target=0.5),
        )

    first, second = (make_scored(seed=seed, with_reference=True) for seed in (1, 2))
    ((expected, expected_metrics),), (whole,) = convert(make, [first], [second])
    _, (before,) = convert(make, [first])
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    ((rollout, metrics),), _ = convert(lambda: resumed, [second])
    assert torch.equal(rollout.threshold, expected.threshold)
    assert torch.equal(rollout.advantages, expected.advantages)
    assert metrics["rollout/kl_coefficient"] == expected_metrics["rollout/kl_coefficient"]
    assert resumed.state_dict() == whole.state_dict()
    ((fresh, _),), _ = convert(make, [second])
    assert not torch.equal(fresh.threshold, expected.threshold)


def test_state_of_another_class_or_missing_state_is_ignored(make_gating):
    saved = make_gating(kl_reward=KLReward(coefficient=0.7, target=0.1)).state_dict()
    saved["token_weights"]["state"]["gate"] = {"class": "MineGate", "state": {"strange": 1}}
    resumed = make_gating(
        gate=QuantileGate(0.3, running_decay=0.5),
        kl_reward=KLReward(coefficient=0.2, target=0.1),
        entropy_bonus=EntropyBonus(0.3),
    )
    resumed.load_state_dict(saved)
    assert resumed.token_weights.gate.state_dict() == {"running": None}
    assert (resumed.kl_reward.current, resumed.entropy_bonus.current) == (0.7, 0.3)
    resumed.load_state_dict({})
    assert make_gating(gate=OpenGate()).state_dict() == {"token_weights": {"class": "EntropyGate", "state": {}}}


class Constant:
    """A gate and an attenuation that return one constant."""

    def __init__(self, value):
        self.value = value

    def threshold(self, entropies):
        return torch.tensor(self.value)

    def phi(self, old_logprobs, entropies, threshold):
        return torch.full_like(old_logprobs, self.value)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_negative_or_non_finite_phi_is_refused(make_scored, make_gating, convert, value):
    with pytest.raises(UserError, match=r"model\.attenuation: Constant gave a weight"):
        convert(lambda: make_gating(attenuation=Constant(value)), [make_scored()])


def test_nan_threshold_is_refused(make_scored, make_gating, convert):
    with pytest.raises(UserError, match=r"model\.gate: Constant gave NaN as the threshold"):
        convert(lambda: make_gating(gate=Constant(float("nan"))), [make_scored()])


class Given:
    """A gate, an attenuation and an estimator that return the given object."""

    needs_values = False

    def __init__(self, value):
        self.value = value

    def threshold(self, entropies):
        return self.value

    def phi(self, old_logprobs, entropies, threshold):
        return self.value

    def estimate(self, experience):
        return Estimate(self.value, None)


@pytest.mark.parametrize(("value", "found"), [(0.5, "float"), (None, "NoneType"), (torch.ones(3), r"\(3,\)")])
@pytest.mark.parametrize("part", ["gate", "attenuation", "advantage"])
def test_part_output_of_wrong_type_or_shape_is_refused(make_scored, make_gating, convert, part, value, found):
    with pytest.raises(UserError, match=rf"model\.{part}: Given must give .* got {found}\."):
        convert(lambda: make_gating(**{part: Given(value)}), [make_scored()])


class OtherRankFails:
    """A rank whose sums include an error count of 1 from another rank."""

    def sum_over_ranks(self, values):
        return values + 1

    def gather_over_ranks(self, values):
        return values


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_advantages_are_refused(make_scored, make_gating, convert, value):
    scored = make_scored()
    non_finite = torch.zeros_like(scored.scores.logprobs).masked_fill(scored.completion_mask, value)
    with pytest.raises(UserError, match=r"model\.advantage: Given gave advantages or returns that are infinite or NaN"):
        convert(lambda: make_gating(advantage=Given(non_finite)), [scored])


def test_error_on_another_rank_is_raised_on_this_rank(make_scored, make_gating):
    with pytest.raises(UserError, match="infinite or NaN"):
        make_gating().apply(make_scored(), OtherRankFails())


def test_weight_sum_of_zero_is_not_rescaled(make_scored, make_gating, convert):
    parts = {
        "objective": Objective(rescale_weights=True),
        "gate": Constant(float("inf")),
        "attenuation": ConstantAttenuation(0.0),
    }
    ((rollout, metrics),), _ = convert(lambda: make_gating(**parts), [make_scored()])
    assert rollout.weight_scale.unique().tolist() == [1.0]
    assert (metrics["gate/weight_sum"].item(), metrics["gate/high_fraction"].item()) == (0.0, 0.0)
    assert "gate/threshold" not in metrics
