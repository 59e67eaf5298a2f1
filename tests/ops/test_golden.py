"""Our operations against the field's reference implementations (each fixture names its source), in float64."""

import pytest
import torch
from torch.testing import assert_close

from egspo_lightning.ops.advantages import group_relative, leave_one_out
from egspo_lightning.ops.gate import confidence_phi, high_entropy_mask, quantile_threshold
from egspo_lightning.ops.losses import clipped_tokens, kl_penalty, log_ratio, nll, ppo_clip
from egspo_lightning.ops.masking import aggregate, masked_mean
from egspo_lightning.ops.schedules import chord_mu
from egspo_lightning.ops.token_stats import token_stats_from_logits

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
SINGLE = {"rtol": 1e-5, "atol": 1e-5}


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def test_token_stats(golden):
    for case in golden("token_stats"):
        stats = token_stats_from_logits(doubles(case["logits"]), torch.tensor(case["ids"]))
        assert_close(stats.logprobs, doubles(case["logprobs"]), **TIGHT)
        assert_close(stats.entropies, doubles(case["entropies"]), **TIGHT)


def test_token_stats_in_float32(golden):
    for case in golden("token_stats"):
        stats = token_stats_from_logits(doubles(case["logits"]).float(), torch.tensor(case["ids"]))
        assert stats.logprobs.dtype == torch.float32
        assert_close(stats.logprobs.double(), doubles(case["logprobs"]), **SINGLE)
        assert_close(stats.entropies.double(), doubles(case["entropies"]), **SINGLE)


def test_ppo_clip_loss_gradient_and_diagnostics(golden):
    for case in golden("ppo_clip"):
        logprobs = doubles(case["logprobs"]).requires_grad_()
        old, advantages, mask = (doubles(case[key]) for key in ("old_logprobs", "advantages", "mask"))
        clip = {"clip_low": case["clip_low"], "clip_high": case["clip_high"]}
        per_token = ppo_clip(logprobs, old, advantages, **clip, dual_clip=case["dual_clip"])
        loss = aggregate(per_token, mask, case["aggregation"])
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-9, abs=1e-9)
        assert_close(logprobs.grad, doubles(case["grad_logprobs"]), **TIGHT)
        below, above = clipped_tokens(logprobs.detach(), old, advantages, **clip)
        assert masked_mean((below | above).double(), mask).item() == pytest.approx(case["clip_fraction"], abs=1e-12)
        kl = masked_mean(-log_ratio(logprobs.detach(), old), mask).item()
        assert kl == pytest.approx(case["approx_kl"], rel=1e-9, abs=1e-9)


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


def test_kl_penalty(golden):
    for case in golden("kl"):
        kl = kl_penalty(doubles(case["logprobs"]), doubles(case["ref_logprobs"]), case["estimator"])
        assert_close(kl, doubles(case["kl"]), **TIGHT)


def test_group_relative(golden):
    for case in golden("group_advantage"):
        advantages = group_relative(
            doubles(case["rewards"]), case["group_size"], scale_by_std=case["scale_by_std"], eps=case["eps"]
        )
        assert_close(advantages, doubles(case["advantages"]), **TIGHT)


def test_leave_one_out(golden):
    for case in golden("rloo"):
        advantages = leave_one_out(doubles(case["rewards"]), case["group_size"])
        assert_close(advantages, doubles(case["advantages"]), **TIGHT)


def test_quantile_threshold_and_high_entropy_mask(golden):
    for case in golden("high_entropy_mask"):
        entropies, mask = doubles(case["entropies"]), torch.tensor(case["mask"])
        threshold = quantile_threshold(entropies, mask, case["top_fraction"])
        assert threshold.item() == pytest.approx(case["threshold"], rel=1e-9, abs=1e-9)
        high = high_entropy_mask(entropies, mask, threshold)
        assert high.tolist() == [[bool(v) for v in row] for row in case["is_high_entropy"]]


def test_chord_mu(golden):
    for case in golden("chord_mu"):
        schedule = {key: case[key] for key in ("warmup_steps", "decay_steps", "peak", "valley")}
        ours = [chord_mu(step, **schedule) for step in case["steps"]]
        assert ours == pytest.approx(case["mu"], rel=1e-9, abs=1e-9)


def test_chord_phi(golden):
    for case in golden("chord_phi_sft"):
        logprobs, mask = doubles(case["logprobs"]), doubles(case["mask"])
        phi = confidence_phi(logprobs)
        assert_close(phi, doubles(case["phi"]), **TIGHT)
        assert aggregate(phi * nll(logprobs), mask, "token-mean").item() == pytest.approx(case["loss"], rel=1e-9)
        assert aggregate(nll(logprobs), mask, "token-mean").item() == pytest.approx(case["nll"], rel=1e-9)
