"""Methods of others against their reference implementations, in the files of ``../shared/golden/rivals``.

``EGSPO_RIVALS_DIR`` names another folder of the same form. Each case is checked, at a relative tolerance of 1e-7, or
listed in ``NOT_FOLLOWED`` with the reason why our value differs. A case that is neither fails.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.testing import assert_close

from egspo_lightning.evaluation.metrics import majority_at_k, pass_at_k
from egspo_lightning.ops.advantages import against_group, group_relative
from egspo_lightning.ops.correction import is_corrected, sampler_ratios, sampler_weights
from egspo_lightning.ops.entropy_advantages import grpo_s, gtpo, gtpo_rewards, token_group_relative
from egspo_lightning.ops.expert_methods import dft, hpt_switch, sequence_entropy, srft_expert, srft_policy
from egspo_lightning.ops.gate import high_entropy_mask, quantile_threshold, token_weights
from egspo_lightning.ops.hapo import HAPO, clip_widths, redistributed_advantages, relative_entropies
from egspo_lightning.ops.losses import clipped_surrogate, clipped_tokens, kl_penalty, nll, off_policy, ppo_clip
from egspo_lightning.ops.masking import aggregate, masked_mean
from egspo_lightning.ops.surrogates import CEGPPO, CISPO, GSPO, SAPO, KLCov, unclipped, unclipped_ratio
from egspo_lightning.ops.token_selection import advantage_covariance, share_of_tokens
from egspo_lightning.ops.token_view import Statistics, TokenView
from egspo_lightning.ops.token_weight_methods import (
    STEER,
    AdvantageReweighting,
    ClipCov,
    entropy_change,
    probability_weights,
)
from egspo_lightning.rewards.functions import Details
from egspo_lightning.rewards.length import SoftLengthPenalty

FOLDER = Path(os.environ.get("EGSPO_RIVALS_DIR") or Path(__file__).parents[2].parent / "shared" / "golden" / "rivals")
TOLERANCE = {"rtol": 1e-7, "atol": 1e-8}
"""The absolute one is that of references that add 1e-8 to a divisor, for values near 0."""
FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}

Case = dict[str, Any]
CHECKS: dict[tuple[str, str], Callable[[Case], None]] = {}


class NotFollowed(NamedTuple):
    """Cases of a file that our code does not reproduce, and why."""

    file: str
    implementation: str
    where: Callable[[Case], bool]
    reason: str


def checks(file: str, *implementations: str):
    """Register the check of a file's cases, for some implementations; "" if the cases name none."""

    def register(check: Callable[[Case], None]) -> Callable[[Case], None]:
        CHECKS.update({(file, name): check for name in implementations or ("",)})
        return check

    return register


def every(case: Case) -> bool:
    return True


def has(**wanted: Any) -> Callable[[Case], bool]:
    """Whether a case's fields have the wanted values; a tuple lists alternatives."""
    return lambda case: all(
        case.get(name) in (value if isinstance(value, tuple) else (value,)) for name, value in wanted.items()
    )


def log_ratios(case: Case) -> torch.Tensor:
    """Log-ratio of each token, 0 outside the mask."""
    logprobs, old, mask = floats(case, "logprobs", "old_logprobs", "mask")
    return (logprobs - old) * mask


def has_unbounded_ratio(case: Case) -> bool:
    """A token of negative advantage whose log-ratio is above 20, which nothing clips."""
    (advantages,) = floats(case, "advantages")
    return bool(((log_ratios(case) > 20) & (advantages < 0)).any())


def has_large_sequence_ratio(case: Case) -> bool:
    (mask,) = floats(case, "mask")
    return bool((masked_mean(log_ratios(case), mask, -1) > 10).any())


def has_large_token(case: Case) -> bool:
    old, sampled, mask = floats(case, "old_logprobs", "rollout_logprobs", "mask")
    return bool((((old - sampled) * mask).abs() > 20).any())


def has_one_on_policy(case: Case) -> bool:
    groups = torch.tensor(case["is_on_policy"]).view(-1, case["group_size"])
    return bool((groups.sum(-1) < 2).any())


def falls_back_for_padding(case: Case) -> bool:
    """A group whose value at padding, where the reward is 0, is the only one of 5 or more in size."""
    mask = torch.tensor(case["mask"]).bool()
    rewards = torch.tensor(case["rewards"]).double().unsqueeze(1).expand_as(mask)
    for values, inside in zip(rewards.split(case["group_size"]), mask.split(case["group_size"]), strict=True):
        mean, std = values[inside].mean(), values[inside].std(correction=0)
        scale = std + case["eps"] if case["scale_by_std"] else 1.0
        largest, padding = ((values[inside] - mean) / scale).abs().max(), (mean / scale).abs()
        if std > 0 and largest < 5 <= padding and not inside.all():
            return True
    return False


RATIO_BOUND = "nothing bounds the ratio where A < 0 there; ours is at most exp(20), as verl's"

GEOMETRIC_MASK = "weights the tokens of kept sequences by their own ratios there, here by the sequence's mean"

NOT_FOLLOWED = [
    NotFollowed("gspo", "verl", has_large_sequence_ratio, "verl bounds the sequence's log-ratio by 10, the paper not"),
    NotFollowed("dapo_loss", "trl", has_unbounded_ratio, RATIO_BOUND),
    NotFollowed("dapo_loss", "ms-swift", has_unbounded_ratio, RATIO_BOUND),
    NotFollowed("dr_grpo_loss", "trl", has_unbounded_ratio, RATIO_BOUND),
    NotFollowed("dr_grpo_loss", "ms-swift", has_unbounded_ratio, RATIO_BOUND),
    NotFollowed("dr_grpo_loss", "understand-r1-zero", has_unbounded_ratio, RATIO_BOUND),
    NotFollowed("top_entropy_loss", "trl", has_unbounded_ratio, RATIO_BOUND),
    NotFollowed("top_entropy_loss", "ms-swift", has_unbounded_ratio, RATIO_BOUND),
    NotFollowed("top_entropy_loss", "ms-swift", lambda case: "truncated" in case,
                "ranks the tokens of masked completions too; our gate ranks the tokens of the loss"),
    NotFollowed("dr_grpo_advantage", "understand-r1-zero", has(group_size=1), "a group needs two completions here"),
    NotFollowed("dr_grpo_advantage", "verl", has(group_size=1), "a group needs two completions here"),
    NotFollowed("dr_grpo_advantage", "ms-swift", has(group_size=1), "a group needs two completions here"),
    NotFollowed("luffy_advantage", "luffy", has_one_on_policy, "a group needs two completions of the policy here"),
    NotFollowed("luffy_loss", "luffy", has(off_policy_reshape=("no_reshape", "square_root")),
                "of the shapings, the paper's p / (p + gamma) is offered"),
    NotFollowed("luffy_loss", "luffy", lambda case: case["off_max_clip"] is not None,
                "the cap of f(p) is not offered"),
    NotFollowed("advantage_reweighting", "ar-lopti",
                has(method=("both_sigmoid", "negative_sigmoid", "negative_sigmoid_balance1", "both_linear_balance1",
                            "mask_prob_interval2", "RAFT_linear")),
                "the paper's method is both_linear_normal; the others are trials in the authors' code"),
    NotFollowed("hapo_advantage", "hapo", falls_back_for_padding,
                "takes GRPO's advantage because of a value at padding, which depends on the batch's width"),
    NotFollowed("gtpo", "miner", every,
                "whitens over the whole batch, stops where all answers are right, and adds 1e-6 to sums; the paper and "
                "textpolicy whiten within the group"),
    NotFollowed("srft", "unify-post-training", has(on_policy_term="p"), "the paper's term is log p"),
    NotFollowed("rollout_is_weights", "verl", has(batch_normalize=True), "self-normalized weights are not offered"),
    NotFollowed("rollout_is_loss", "verl", lambda case: case["objective"].startswith("reinforce"),
                "bypass mode, which weights by the current policy over the sampler, is not offered"),
    NotFollowed("rollout_is_loss", "verl", lambda case: case["rollout_rs"] is not None,
                "rejected tokens leave the normalizer there; masked tokens count here, as in TRL and ms-swift"),
    NotFollowed("rollout_is_weights", "ms-swift", has(level="geometric", kind="mask"), GEOMETRIC_MASK),
    NotFollowed("rollout_is_loss", "ms-swift", has(level="geometric", kind="mask"), GEOMETRIC_MASK),
    NotFollowed("rollout_rejection", "verl", lambda case: case["rollout_rs"] == "seq_mean_k1" and has_large_token(case),
                "the geometric mean bounds each token's log-ratio by 20 here, as ms-swift's"),
    NotFollowed("rollout_rejection", "verl",
                lambda case: case["rollout_rs"] not in ("token_k1", "seq_sum_k1", "seq_mean_k1"),
                "rejection by k2, k3, the largest token or several rules is not offered"),
    NotFollowed("rollout_metrics", "verl", every, "perplexities, KL and chi2 of the engine are not logged"),
    NotFollowed("bootstrap_metrics", "", every,
                "draws samples with replacement, which is biased; pass@k and maj@k here use all samples"),
]  # fmt: skip


# Reading of cases


def floats(case: Case, *names: str) -> list[torch.Tensor]:
    return [torch.tensor(case[name], dtype=torch.float64) for name in names]


def assert_near(ours: torch.Tensor, expected: Any, mask: torch.Tensor | None = None, **tolerance: float) -> None:
    """Assert equality to stored numbers, within the mask."""
    wanted = torch.tensor(expected, dtype=torch.float64) if mask is None else masked(expected, mask)
    found = ours.detach().double() if mask is None else ours.detach().double()[mask.bool()]
    assert_close(found, wanted, **(TOLERANCE | tolerance))


def masked(rows: list[list[float | None]], mask: torch.Tensor) -> torch.Tensor:
    """Stored (B, T) numbers within the mask; a null is not a number."""
    filled = [[math.nan if value is None else float(value) for value in row] for row in rows]
    return torch.tensor(filled, dtype=torch.float64)[mask.bool()]


def view(case: Case, **fields: Any) -> TokenView:
    """The tokens of a case, in one group; missing fields are 0."""
    (mask,) = floats(case, "mask")
    zeros = torch.zeros_like(mask)
    names = ("logprobs", "old_logprobs", "entropies", "advantages")
    given = {name: floats(case, name)[0] if name in case else zeros for name in names}
    rows = torch.arange(len(mask))
    tokens = TokenView(
        current_entropies=given["entropies"],
        mask=mask.bool(),
        rewards=zeros[:, 0],
        is_truncated=torch.zeros(len(mask), dtype=torch.bool),
        groups=torch.zeros_like(rows),
        members=rows,
        number=0,
        ref_logprobs=None,
        threshold=zeros[:, :1],
        over_ranks=Statistics(),
        **given,
    )
    return tokens._replace(**fields)


def assert_loss(case: Case, per_token: Callable[[TokenView], torch.Tensor], reduce=None, grad: str = "grad_logprobs"):
    """Assert loss and gradient of per-token terms of a case."""
    logprobs = floats(case, "logprobs")[0].requires_grad_()
    tokens = view(case, logprobs=logprobs)
    loss = (reduce or reduced)(case, per_token(tokens), tokens.mask)
    assert_near(loss, case["loss"])
    assert_near(torch.autograd.grad(loss, logprobs)[0], case[grad])


def reduced(case: Case, per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Aggregated as the case says; references that count empty sequences do so by the normalizer."""
    sequences, nonempty = len(mask), int(mask.any(-1).sum())
    mode, normalizer = {
        "token-mean": ("token-mean", None),
        "seq-mean-token-mean": ("seq-mean-token-mean", None),
        "seq-mean-token-mean, empty sequences counted": ("seq-mean-token-mean", sequences),
        "sum / (sequences * max_completion_length)": ("seq-mean-token-sum-norm", sequences),
        "sum / (sequences * max_completion_length), empty sequences not counted": ("seq-mean-token-sum-norm", nonempty),
    }[case.get("aggregation", "token-mean")]
    if mode == "seq-mean-token-sum-norm":
        normalizer = normalizer * case["max_completion_length"]
    return aggregate(per_token, mask, mode, normalizer=normalizer)


def clipped_ppo(case: Case) -> Callable[[TokenView], torch.Tensor]:
    """Our PPO surrogate, with the clips of a case."""
    clips = {name: case[name] for name in ("clip_low", "clip_high")}
    return lambda tokens: ppo_clip(
        tokens.logprobs, tokens.old_logprobs, tokens.advantages, **clips, dual_clip=case.get("dual_clip")
    )


def ratio_clip(tokens: TokenView, low: float, high: float) -> torch.Tensor:
    """PPO's surrogate of ratios up to exp(40), as references that do not bound them."""
    ratio = unclipped_ratio(tokens.logprobs, tokens.old_logprobs)
    return clipped_surrogate(ratio, tokens.advantages, 1 - low, 1 + high)


# Surrogates


@checks("cispo", "verl", "trl", "ms-swift")
def check_cispo(case):
    assert_loss(case, CISPO(case["ratio_max"], case["ratio_min"] or 0.0).per_token)


@checks("gspo", "verl", "trl", "ms-swift")
def check_gspo(case):
    level = {"sequence": "sequence", "sequence_token": "token"}[case["level"]]
    assert_loss(case, GSPO(case["clip_low"], case["clip_high"], level).per_token)


@checks("sapo", "verl", "trl", "ms-swift")
def check_sapo(case):
    assert_loss(case, SAPO(case["tau_pos"], case["tau_neg"]).per_token)


@checks("ce_gppo", "ce-gppo")
def check_ce_gppo(case):
    fields = [case[name] for name in ("clip_low", "clip_high", "beta1", "beta2", "dual_clip")]
    assert_loss(case, CEGPPO(*fields).per_token)


@checks("kl_cov", "verl", "entropy-mechanism")
def check_kl_cov(case):
    """Entropy-Mechanism counts in per cent, and lowers its number to the number of tokens, as the test does here."""
    num_tokens = sum(map(sum, case["mask"]))
    fraction = case["kl_cov_ratio"] if "kl_cov_ratio" in case else min(case["k_percent"], num_tokens) / 100
    surrogate = KLCov(fraction, case["ppo_kl_coef"])
    assert sorted(surrogate.selected(view(case)).nonzero().tolist()) == sorted(case["selected"])
    assert_loss(case, surrogate.per_token)


@checks("hapo", "hapo")
def check_hapo(case):
    """The reference's h is the size of ours: it loses the sign (see ``HAPO``), so the loss is checked for its h."""
    entropies, mask = floats(case, "entropies", "mask")
    h = relative_entropies(entropies, mask.bool(), pivot=case["entropy_pivot"], over_ranks=Statistics())
    assert_near(h.abs(), case["h_hat"], mask)
    is_low = entropies.clamp(min=1e-8).log() < case["pivot_log_entropy"] - 1e-12
    assert torch.equal((h < 0)[mask.bool()], is_low[mask.bool()])
    stored = floats(case, "h_hat")[0]
    surrogate = HAPO(
        case["entropy_pivot"],
        case["clip_alpha"] if case["adaptive_clip"] else 0.0,
        case["adv_beta"] if case["adaptive_advantage"] else 0.0,
        case["clip_low"],
        case["clip_high"],
        case["dual_clip"],
    )
    assert_loss(case, lambda tokens: surrogate.loss(tokens.logprobs, tokens.old_logprobs, tokens.advantages, stored))


@checks("hapo_signed", "hapo")
def check_hapo_signed(case):
    h, ratio, advantages = floats(case, "h_hat", "ratio", "advantages")
    low, high = clip_widths(h, clip_low=case["clip_low"], clip_high=case["clip_high"], alpha=case["clip_alpha"])
    assert_near(low, case["token_clip_low"])
    assert_near(high, case["token_clip_high"])
    changed = redistributed_advantages(h, ratio, advantages, low, high, beta=case["adv_beta"])
    assert_near(changed, case["redistributed_advantages"])


@checks("dapo_loss", "verl", "trl", "ms-swift")
def check_dapo(case):
    normalizer = case["global_tokens"] / case["processes"]
    assert_loss(
        case,
        clipped_ppo(case),
        lambda case, per_token, mask: aggregate(per_token, mask, "token-mean", normalizer=normalizer),
    )


@checks("dr_grpo_loss", "verl", "trl", "ms-swift", "understand-r1-zero")
def check_dr_grpo(case):
    assert_loss(case, clipped_ppo(case))


@checks("top_entropy_loss", "trl", "ms-swift")
def check_top_entropy(case):
    """``grpo`` is the mean of sequence means with empty sequences counted; the others are token means."""
    entropies, mask = floats(case, "entropies", "mask")
    tau = quantile_threshold(entropies, mask, case["top_entropy_quantile"])
    assert_near(tau, case["threshold"], **FLOAT32)
    assert high_entropy_mask(entropies, mask, tau).tolist() == torch.tensor(case["is_high_entropy"]).bool().tolist()

    def per_token(tokens):
        gated = token_weights(entropies, tau, 0.0) * clipped_ppo(case)(tokens)
        if not case["kl_beta"]:
            return gated
        return gated + case["kl_beta"] * kl_penalty(tokens.logprobs, floats(case, "ref_logprobs")[0], "k3")

    aggregation = "seq-mean-token-mean, empty sequences counted" if case["loss_type"] == "grpo" else "token-mean"
    assert_loss(case | {"aggregation": aggregation}, per_token)


# Token weights


@checks("clip_cov", "verl", "entropy-mechanism")
def check_clip_cov(case):
    """The reference draws at random, so the loss is checked for its draw, and ours where all candidates are drawn."""
    bounds = [case[f"clip_cov_{name}"] for name in ("ratio", "lb", "ub")]
    method, tokens, mask = ClipCov(*bounds, case["clip_low"], case["clip_high"]), view(case), floats(case, "mask")[0]
    covariance = advantage_covariance(tokens.logprobs, tokens.advantages, tokens.mask, Statistics())
    is_known = torch.tensor([[value is not None for value in row] for row in case["covariance"]])  # null where clipped
    assert_near(covariance, case["covariance"], mask.bool() & is_known)
    clips = {"clip_low": case["clip_low"], "clip_high": case["clip_high"]}
    below, above = clipped_tokens(tokens.logprobs, tokens.old_logprobs, tokens.advantages, **clips)
    assert_near((below | above).double(), case["clipped_by_ratio"], mask)
    candidates = sorted(method.candidates(tokens).nonzero().tolist())
    assert candidates == sorted(case["candidates"])
    assert share_of_tokens(case["clip_cov_ratio"], tokens.mask, Statistics()) == case["number_to_pick"]
    dropped = (method.weights(tokens) == 0).nonzero().tolist()
    assert len(dropped) == min(case["number_to_pick"], len(candidates)) == len(case["picked"])
    assert all(token in candidates for token in dropped)
    weights = torch.ones_like(mask)
    for row, column in case["picked"]:
        weights[row, column] = 0.0
    assert_loss(case, lambda tokens: weights * ratio_clip(tokens, case["clip_low"], case["clip_high"]))


@checks("steer", "steer")
def check_steer(case):
    tokens, method = view(case), STEER(case["mapping"], case["weight_min"], case["weight_max"])
    change = entropy_change(tokens.logprobs, tokens.old_logprobs, tokens.entropies, tokens.advantages)
    assert_near(change, case["entropy_change"], tokens.mask)
    weights = method.weights(tokens)
    assert_near(weights, case["weights"], tokens.mask)
    assert_loss(case, lambda tokens: weights * clipped_ppo(case)(tokens))


@checks("advantage_reweighting", "ar-lopti")
def check_advantage_reweighting(case):
    """``both_linear`` ignores the factor of negative advantages."""
    tokens, negative = view(case), case["neg_adv_weight"] if case["method"] == "both_linear_normal" else 1.0
    factors = {"slope": case["reweight_k"], "base": case["reweight_tau"], "negative": negative}
    weights = probability_weights(tokens.old_logprobs, tokens.advantages, **factors)
    assert_near(tokens.advantages * weights, case["reweighted"], tokens.mask)
    if case["reweight_k"] + case["reweight_tau"] == 1:
        assert_near(AdvantageReweighting(case["reweight_k"], negative).weights(tokens), weights.tolist())


# Advantages


@checks("dr_grpo_advantage", "verl", "ms-swift", "understand-r1-zero")
def check_dr_grpo_advantage(case):
    scale = {"scale_by_std": case["scale_by_std"], "eps": case.get("eps", 1e-6)}
    assert_near(group_relative(case["rewards"], case["group_size"], **scale), case["advantages"])


@checks("luffy_advantage", "luffy")
def check_luffy_advantage(case):
    (mask,), scale = floats(case, "mask"), {"scale_by_std": case["scale_by_std"], "eps": case["eps"]}
    rewards, own = torch.tensor(case["rewards"], dtype=torch.float64), torch.tensor(case["is_on_policy"])
    ours = torch.zeros_like(rewards)
    for rows in torch.arange(len(rewards)).split(case["group_size"]):
        group = rewards[rows[own[rows]]]
        ours[rows[own[rows]]] = group_relative(group, len(group), **scale)
        expert = rows[~own[rows]]
        ours[expert] = against_group(rewards[expert], group.expand(len(expert), -1), **scale)
    assert_near(ours.unsqueeze(1) * mask, case["advantages"])


@checks("gtpo", "textpolicy")
def check_gtpo(case):
    mask, given = floats(case, "mask")[0], [case[name] for name in ("rewards", "entropies", "mask", "group_size")]
    weights = {"alpha1": case["alpha1"], "alpha2": case["alpha2"], "eps": case["eps"]}
    assert_near(gtpo_rewards(*given, **weights), case["shaped_rewards"], mask)
    advantages = gtpo(*given, **weights)
    assert_near(advantages, case["advantages"], mask)
    ppo = clipped_ppo(case)
    assert_loss(case | {"advantages": case["advantages"]}, lambda tokens: ppo(tokens._replace(advantages=advantages)))


@checks("grpo_s", "miner")
def check_grpo_s(case):
    entropies, mask = floats(case, "entropies", "mask")
    assert_near(sequence_entropy(entropies, mask).squeeze(1), case["sequence_entropies"])
    weights = {"beta1": case["beta1"], "beta2": case["beta2"], "eps": case["eps"]}
    ours = grpo_s(case["rewards"], entropies, mask, case["group_size"], **weights)
    assert_near(ours.unsqueeze(1).expand_as(mask), case["advantages"], mask)


@checks("hapo_advantage", "hapo")
def check_hapo_advantage(case):
    (mask,), scale = floats(case, "mask"), {"scale_by_std": case["scale_by_std"], "eps": case["eps"]}
    ours = token_group_relative(case["rewards"], mask, case["group_size"], **scale)
    assert_near(ours.unsqueeze(1).expand_as(mask), case["advantages"], mask)


# Expert demonstrations


@checks("dft", "trl", "dft")
def check_dft(case):
    """From the logits, so that the gradient is that of the model's output."""
    logits, mask = floats(case, "logits", "mask")
    labels = torch.tensor(case["labels"]).unsqueeze(-1).clamp(min=0)
    logits.requires_grad_()
    logprobs = logits.log_softmax(-1).gather(-1, labels).squeeze(-1)
    assert_near(logprobs, case["logprobs"], mask)
    loss = aggregate(dft(logprobs), mask, "token-mean", normalizer=case["normaliser"])
    assert_near(loss, case["loss"])
    grad_logits, grad_logprobs = torch.autograd.grad(loss, [logits, logprobs])
    assert_near(grad_logits, case["grad_logits"])
    if "grad_logprobs" in case:
        assert_near(grad_logprobs, case["grad_logprobs"])


@checks("dft", "ms-swift")
def check_dft_tokens(case):
    """ms-swift computes in float32."""
    logprobs, mask = floats(case, "logprobs", "mask")
    assert_near(dft(logprobs), case["token_losses"], mask, **FLOAT32)


@checks("srft", "unify-post-training")
def check_srft(case):
    entropies, mask = floats(case, "entropies", "mask")
    expert = torch.tensor(case["is_demonstration"]).unsqueeze(1)
    assert_near(sequence_entropy(entropies, mask).squeeze(1), case["sequence_entropy"])
    right = torch.tensor(case["rewards"]) == 1

    def loss_of(case, tokens, _):
        rl = torch.where(
            expert,
            off_policy(tokens.logprobs, tokens.advantages, shaping=0.1),
            srft_policy(tokens.logprobs, right, entropies, mask),
        )
        rl = aggregate(rl, mask, "token-mean", normalizer=mask.shape[1] if case["normaliser"] == "width" else None)
        sft = aggregate(srft_expert(tokens.logprobs, entropies, mask), mask.bool() & expert, "token-mean")
        assert_near(rl, case["rl_loss"])
        assert_near(sft, case["sft_loss"] or 0.0)
        return rl + sft

    assert_loss(case, lambda tokens: tokens, loss_of)


@checks("hpt_loss", "unify-post-training")
def check_hpt_loss(case):
    expert = torch.tensor(case["is_demonstration"]).unsqueeze(1)

    def loss_of(case, tokens, mask):
        sft = aggregate(nll(tokens.logprobs), mask & expert, "token-mean")
        assert_near(sft, case["sft_loss"] or 0.0)
        width = mask.shape[1] if case["normaliser"] == "width" else None
        clip = case["clip"]
        rl = (
            unclipped(tokens.logprobs, tokens.old_logprobs, tokens.advantages)
            if clip is None
            else ratio_clip(tokens, clip, clip)
        )
        return case["sft_loss_coef"] * sft + aggregate(rl, mask & ~expert, "token-mean", normalizer=width)

    assert_loss(case, lambda tokens: tokens, loss_of)


@checks("hpt_switch", "unify-post-training")
def check_hpt_switch(case):
    assert sum(reward == 1 for reward in case["rewards"]) == case["solved"]
    switch = hpt_switch([case["solved"]], gate=case["switch_gate"], off_policy_gate=case["switch_gate_off"])
    expected = {"rl": (False, False), "sft": (True, False), "off-policy rl": (False, True)}[case["use"]]
    assert (switch.sft.item(), switch.off_policy.item()) == expected


@checks("luffy_loss", "luffy")
def check_luffy(case):
    expert = torch.tensor(case["is_demonstration_token"]).bool()
    shaping = float(case["off_policy_reshape"].removeprefix("p_div_p_"))

    def per_token(tokens):
        clip = case["clip"]
        own = (
            unclipped(tokens.logprobs, tokens.old_logprobs, tokens.advantages)
            if clip is None
            else ratio_clip(tokens, clip, clip)
        )
        return torch.where(expert, off_policy(tokens.logprobs, tokens.advantages, shaping=shaping), own)

    def by_width(case, per_token, mask):
        width = mask.shape[1] if case["normaliser"] == "width" else None
        return aggregate(per_token, mask, "token-mean", normalizer=width)

    assert_loss(case, per_token, by_width)


# Correction for the sampler


def corrected_weights(case: Case, cap: float, floor: float | None, mode: str) -> torch.Tensor:
    old, sampled, mask = floats(case, "old_logprobs", "rollout_logprobs", "mask")
    ratios = sampler_ratios(old, sampled, mask.bool(), level=case["level"])
    return sampler_weights(ratios, mode=mode, cap=cap, floor=floor)


def bounds_of(case: Case) -> dict[str, Any]:
    """Masking without a lower bound is a floor of 0."""
    lower, mode = case.get("lower"), {"truncate": "truncated", "mask": "masked"}[case["kind"]]
    return {"cap": case["upper"], "mode": mode, "floor": 0.0 if lower is None and mode == "masked" else lower}


@checks("rollout_is_weights", "verl", "trl", "ms-swift")
def check_rollout_is_weights(case):
    (mask,), stored = floats(case, "mask"), torch.tensor(case["weights"], dtype=torch.float64)
    assert_near(corrected_weights(case, **bounds_of(case)), stored.expand_as(mask).tolist(), mask)


@checks("rollout_is_loss", "verl", "trl", "ms-swift")
def check_rollout_is_loss(case):
    if case["implementation"] != "verl":
        bounds = bounds_of(case)
    elif isinstance(case["threshold"], str):
        floor, cap = map(float, case["threshold"].split("_"))
        bounds = {"cap": cap, "mode": "masked", "floor": floor}
    else:
        bounds = {"cap": case["threshold"], "mode": "truncated", "floor": None}
    weights = corrected_weights(case, **bounds)
    stored = torch.tensor(case["weights"], dtype=torch.float64).expand_as(weights)
    assert_near(weights, stored.tolist(), floats(case, "mask")[0])
    assert_loss(case, lambda tokens: weights * clipped_ppo(case)(tokens))


@checks("rollout_rejection", "verl")
def check_rollout_rejection(case):
    """k1 is the inverse log-ratio: bounds of sampler / trainer are inverse bounds of our weights."""
    old, sampled, mask = floats(case, "old_logprobs", "rollout_logprobs", "mask")
    level = {"token_k1": "token", "seq_sum_k1": "sequence", "seq_mean_k1": "geometric"}[case["rollout_rs"]]
    threshold = case["rollout_rs_threshold"]
    if isinstance(threshold, str) and "_" in threshold:
        low, high = map(float, threshold.split("_"))
    else:
        low, high = 1 / float(threshold), float(threshold)
    ratios = sampler_ratios(old, sampled, mask.bool(), level=level)
    kept = mask.bool() & ~is_corrected(ratios, mode="masked", cap=1 / low, floor=1 / high)
    assert_near(kept.double(), case["kept"])


# Lengths and scores


@checks("overlong_penalty", "trl", "verl", "ms-swift")
def check_overlong_penalty(case):
    """Up to the limit, which no completion passes here; TRL has a floor beyond it, as we have."""
    top = case["max_length"] if case["floor"] is None else math.inf
    wanted = {length: value for length, value in zip(case["lengths"], case["penalties"], strict=True) if length <= top}
    details = [Details(None, "", length, case["max_length"], False, None) for length in wanted]
    ours = SoftLengthPenalty(case["buffer"])([""] * len(wanted), [""] * len(wanted), details)
    assert [case["penalty_factor"] * value for value in ours] == pytest.approx(list(wanted.values()), rel=1e-7)


@checks("pass_at_k")
def check_pass_at_k(case):
    ours = pass_at_k(case["n"], case["c"], case["k"])
    for value in (case["pass_at_k"], *case["values"].values()):
        assert ours == pytest.approx(value, rel=1e-7, abs=1e-12)


@checks("maj_at_k")
def check_maj_at_k(case):
    """As NeMo-Skills; the others count the answer that was seen first where several are most frequent."""
    k, correct = case["k"], [bool(value) for value in case["correct"]]
    if "nemo_skills" in case:
        answers = case["nemo_skills"]["answers"][:k]
        assert majority_at_k(answers, correct[:k]) == pytest.approx(case["nemo_skills"]["majority"], rel=1e-7)
    answers = case["answers"][:k]
    counts = sorted((answers.count(answer) for answer in set(answers)), reverse=True)
    if len(counts) == 1 or counts[0] > counts[1]:
        for value in case["values"].values():
            assert majority_at_k(answers, correct[:k]) == value


# The test


def groups_of_cases() -> list[Any]:
    """(file, implementation, numbered cases) of every file in the folder."""
    groups: dict[tuple[str, str], list[tuple[int, Case]]] = {}
    for path in sorted(FOLDER.glob("*.json")):
        for number, case in enumerate(json.loads(path.read_text())["cases"]):
            groups.setdefault((path.stem, case.get("implementation", "")), []).append((number, case))
    if not groups:
        skip = pytest.mark.skip(reason=f"needs the reference data in {FOLDER}")
        return [pytest.param("none", "", [], id="no-reference-data", marks=skip)]
    return [pytest.param(*key, cases, id="-".join(filter(None, key))) for key, cases in groups.items()]


def fault_of(file: str, implementation: str, case: Case) -> str | None:
    """What is wrong with a case, if something is."""
    if any(row[:2] == (file, implementation) and row.where(case) for row in NOT_FOLLOWED):
        return None
    check = CHECKS.get((file, implementation))
    if check is None:
        return "is neither checked nor listed in NOT_FOLLOWED"
    try:
        check(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(("file", "implementation", "cases"), groups_of_cases())
def test_against_reference(file, implementation, cases):
    faults = [(number, case.get("name", ""), fault_of(file, implementation, case)) for number, case in cases]
    told = [f"case {number} {name}: {fault}" for number, name, fault in faults if fault]
    assert not told, f"{len(told)} of {len(cases)} cases of {file} ({implementation or 'all'}):\n" + "\n".join(told)


def test_unknown_files_and_wrong_values_are_faults():
    case = {"rewards": [1.0, 0.0], "group_size": 2, "scale_by_std": False, "advantages": [0.5, -0.5]}
    assert fault_of("dr_grpo_advantage", "verl", case) is None
    assert "AssertionError" in fault_of("dr_grpo_advantage", "verl", case | {"advantages": [0.5, -0.500001]})
    assert "KeyError" in fault_of("dr_grpo_advantage", "verl", {"group_size": 2})
    assert "neither checked nor listed" in fault_of("dr_grpo_advantage", "another", case)
    assert "neither checked nor listed" in fault_of("another", "verl", case)
