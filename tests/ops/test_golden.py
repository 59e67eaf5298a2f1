"""Our operations against reference implementations (each data file names its source).

Everything runs in float64 to 1e-9, and again in float32 to 1e-5.
"""

import pytest
import torch
from settled_weights import SETTLED, without_gate
from torch.testing import assert_close

from egspo_lightning.ops.advantages import gae, group_relative, leave_one_out, reinforce_plus_plus
from egspo_lightning.ops.gate import confidence_phi, high_entropy_mask, quantile_threshold
from egspo_lightning.ops.losses import clipped_tokens, kl_penalty, log_ratio, nll, ppo_clip, value_clip
from egspo_lightning.ops.masking import aggregate, masked_mean
from egspo_lightning.ops.objective import Objective, sft_loss, value_loss
from egspo_lightning.ops.schedules import ChordMu, chord_mu
from egspo_lightning.ops.token_stats import token_stats_from_logits
from egspo_lightning.types import ExpertBatch, NetworkOutputs, RolloutBatch, UpdateSize

PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])


def assert_near(ours, expected, dtype, tolerance):
    """Assert the dtype, and equality within the tolerance."""
    assert ours.dtype == dtype
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close(ours.detach().double(), expected, rtol=tolerance, atol=tolerance)


def read(case, dtype, *names):
    return [torch.tensor(case[name], dtype=dtype) for name in names]


def batch_of(case, dtype, **fields):
    """A rollout batch with an open gate, used whole in one optimizer step."""
    mask = torch.tensor(case["mask"]).bool()
    rows, width = mask.shape
    tokens = float(mask.sum())
    zeros = torch.zeros(rows, width, dtype=dtype)
    size = UpdateSize(tokens, float(mask.any(-1).sum()), float(width), tokens, tokens)
    given = {"old_logprobs": zeros, "advantages": zeros, "old_values": None, "returns": None} | fields
    return RolloutBatch(
        input_ids=torch.zeros(rows, width, dtype=torch.long),
        completion_mask=mask,
        entropies=zeros,
        ref_logprobs=None,
        rewards=zeros[:, 0],
        is_expert=torch.zeros(rows, dtype=torch.bool),
        is_masked=torch.zeros(rows, dtype=torch.bool),
        **without_gate(zeros),
        policy_version=0,
        update_size=size,
        **given,
    )


@PRECISIONS
def test_token_stats(golden, dtype, tolerance):
    for case in golden("token_stats"):
        stats = token_stats_from_logits(*read(case, dtype, "logits"), torch.tensor(case["ids"]))
        assert_near(stats.logprobs, case["logprobs"], dtype, tolerance)
        assert_near(stats.entropies, case["entropies"], dtype, tolerance)


@PRECISIONS
def test_ppo_clip_loss_gradient_and_diagnostics(golden, dtype, tolerance):
    for case in golden("ppo_clip"):
        logprobs, old, advantages, mask = read(case, dtype, "logprobs", "old_logprobs", "advantages", "mask")
        logprobs.requires_grad_()
        clip = {"clip_low": case["clip_low"], "clip_high": case["clip_high"]}
        per_token = ppo_clip(logprobs, old, advantages, **clip, dual_clip=case["dual_clip"])
        loss = aggregate(per_token, mask, case["aggregation"])
        loss.backward()
        assert_near(loss, case["loss"], dtype, tolerance)
        assert_near(logprobs.grad, case["grad_logprobs"], dtype, tolerance)
        below, above = clipped_tokens(logprobs.detach(), old, advantages, **clip)
        assert masked_mean((below | above).double(), mask).item() == pytest.approx(case["clip_fraction"], abs=1e-12)
        assert_near(masked_mean(-log_ratio(logprobs.detach(), old), mask), case["approx_kl"], dtype, tolerance)


@PRECISIONS
def test_objective_with_open_gate_equals_ppo_clip(golden, dtype, tolerance):
    for case in golden("ppo_clip"):
        logprobs, old, advantages = read(case, dtype, "logprobs", "old_logprobs", "advantages")
        logprobs.requires_grad_()
        objective = Objective(
            epsilon_low=case["clip_low"],
            epsilon_high=case["clip_high"],
            dual_clip=case["dual_clip"],
            aggregation=case["aggregation"],
        )
        rollout = batch_of(case, dtype, old_logprobs=old, advantages=advantages)
        loss = objective.egspo_loss(NetworkOutputs(logprobs, torch.zeros_like(old)), rollout, SETTLED)
        loss.backward()
        assert_near(loss, case["loss"], dtype, tolerance)
        assert_near(logprobs.grad, case["grad_logprobs"], dtype, tolerance)


def test_ppo_clip_takes_plain_sequences(golden):
    for case in golden("ppo_clip"):
        per_token = ppo_clip(
            case["logprobs"],
            case["old_logprobs"],
            case["advantages"],
            clip_low=case["clip_low"],
            clip_high=case["clip_high"],
            dual_clip=case["dual_clip"],
        )
        loss = aggregate(per_token, case["mask"], case["aggregation"]).item()
        assert loss == pytest.approx(case["loss"], rel=1e-9, abs=1e-9)


@PRECISIONS
def test_kl_penalty(golden, dtype, tolerance):
    for case in golden("kl"):
        kl = kl_penalty(*read(case, dtype, "logprobs", "ref_logprobs"), case["estimator"])
        assert_near(kl, case["kl"], dtype, tolerance)


@PRECISIONS
def test_group_relative(golden, dtype, tolerance):
    for case in golden("group_advantage"):
        (rewards,) = read(case, dtype, "rewards")
        advantages = group_relative(rewards, case["group_size"], scale_by_std=case["scale_by_std"], eps=case["eps"])
        assert_near(advantages, case["advantages"], dtype, tolerance)


@PRECISIONS
def test_leave_one_out(golden, dtype, tolerance):
    for case in golden("rloo"):
        assert_near(
            leave_one_out(*read(case, dtype, "rewards"), case["group_size"]), case["advantages"], dtype, tolerance
        )


@PRECISIONS
def test_gae(golden, dtype, tolerance):
    for case in golden("gae"):
        inputs = read(case, dtype, "token_rewards", "values", "mask")
        advantages, returns = gae(*inputs, gamma=case["gamma"], lam=case["lam"])
        assert_near(advantages, case["advantages_whitened"], dtype, tolerance)
        assert_near(returns, case["returns"], dtype, tolerance)


@PRECISIONS
def test_reinforce_plus_plus(golden, dtype, tolerance):
    for case in golden("reinforce_plus_plus"):
        advantages = reinforce_plus_plus(*read(case, dtype, "token_rewards", "mask"), gamma=case["gamma"])
        assert_near(advantages, case["advantages"], dtype, tolerance)


@PRECISIONS
def test_value_loss(golden, dtype, tolerance):
    for case in golden("value_loss"):
        values, old, returns, mask = read(case, dtype, "values", "old_values", "returns", "mask")
        per_token = value_clip(values, old, returns, clip=case["clip"])
        assert_near(aggregate(per_token, mask, "token-mean"), case["loss"], dtype, tolerance)
        is_clipped = per_token > value_clip(values, old, returns, clip=None)
        assert masked_mean(is_clipped.double(), mask).item() == pytest.approx(case["clip_fraction"], abs=1e-12)
        rollout = batch_of(case, dtype, old_values=old, returns=returns)
        loss, metrics = value_loss(values, rollout, clip=case["clip"])
        assert_near(loss, case["loss"], dtype, tolerance)
        assert_near(metrics["loss/value"], case["loss"], dtype, tolerance)


@PRECISIONS
def test_quantile_threshold_and_high_entropy_mask(golden, dtype, tolerance):
    for case in golden("high_entropy_mask"):
        entropies, mask = *read(case, dtype, "entropies"), torch.tensor(case["mask"])
        threshold = quantile_threshold(entropies, mask, case["top_fraction"])
        assert_near(threshold, case["threshold"], dtype, tolerance)
        high = high_entropy_mask(entropies, mask, threshold)
        assert high.tolist() == [[bool(v) for v in row] for row in case["is_high_entropy"]]


def test_chord_mu(golden):
    for case in golden("chord_mu"):
        schedule = {key: case[key] for key in ("warmup_steps", "decay_steps", "peak", "valley")}
        ours = [chord_mu(step, **schedule) for step in case["steps"]]
        assert ours == pytest.approx(case["mu"], rel=1e-9, abs=1e-9)
        objective = Objective(mu=ChordMu(**schedule))
        assert [objective.mu_at(step) for step in case["steps"]] == pytest.approx(case["mu"], rel=1e-9, abs=1e-9)


@PRECISIONS
def test_chord_phi(golden, dtype, tolerance):
    for case in golden("chord_phi_sft"):
        logprobs, mask = read(case, dtype, "logprobs", "mask")
        phi = confidence_phi(logprobs)
        assert_near(phi, case["phi"], dtype, tolerance)
        assert_near(aggregate(phi * nll(logprobs), mask, "token-mean"), case["loss"], dtype, tolerance)
        rollout = batch_of(case, dtype)
        expert = ExpertBatch(rollout.input_ids, rollout.completion_mask, rollout.update_size)
        assert_near(sft_loss(logprobs, expert, weighting="confidence"), case["loss"], dtype, tolerance)
        assert_near(sft_loss(logprobs, expert, weighting="plain"), case["nll"], dtype, tolerance)
