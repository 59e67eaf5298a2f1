r"""The loss of one optimizer step in stage EGSPO, from top to bottom::

    L        = (1 - mu) L_EGSPO  +  mu L_SFT  +  beta KL(pi || pi_ref)  +  c_v L_V  -  c_h H
    L_EGSPO  = -(1/N) sum_t  g_t min( r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t )
    r_t      = pi(y_t | x_t) / pi_old(y_t | x_t)
    g_t      = s_t + (1 - s_t) phi_t,   s_t = 1 if H_t >= tau else 0   (or another method)
    L_SFT    = -(1/N_expert) sum_t log pi(y*_t | x*_t)
    L_V      = (1/N) sum_t 1/2 (V_t - R_t)^2, clipped

Source: EGSPO (arXiv 2602.03309), implemented from the abstract. Config values settle what the abstract leaves open:

- g_t comes from a method of token weights, by default ``ops.entropy_gate``: a ``Gate`` gives tau once for each rollout
  batch, over all ranks, an ``Attenuation`` gives phi. H_t is the entropy of the sampling policy, at the sampling
  temperature, frozen over the PPO epochs. g_t is detached.
- A ``Surrogate`` may replace ``min( r_t A_t, ... )``.
- The gate multiplies the surrogate alone. A_t enters both branches ungated, after any whitening, so a wrong trajectory
  also lowers the probability of its confident tokens. (``low_branch: nll`` is the ablation without A_t.)
- phi below 1 shrinks the surrogate relative to the SFT and KL terms and to gradient clipping. ``rescale_weights``
  divides g_t by its mean over the rollout batch.
- ``sampler_correction`` weights the surrogate where an engine did not sample from pi_old, see ``ops.correction``. It is
  off by default.
- N counts the whole optimizer step: the completion tokens (or sequences, by ``aggregation``) of all micro-batches and
  ranks. The losses of micro-batches therefore add up to the loss of the step, however it is split.

Every value returned here is one micro-batch's part of the step's value.
"""

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from egspo_lightning.errors import UserError
from egspo_lightning.ops.correction import SamplerCorrection, sampler_ratios, sampler_weights
from egspo_lightning.ops.diagnostics import Metrics, policy_metrics, value_metrics
from egspo_lightning.ops.expert_methods import ExpertWeighting, expert_nll
from egspo_lightning.ops.losses import KLEstimator, kl_penalty, nll, off_policy, ppo_clip, value_clip
from egspo_lightning.ops.masking import Aggregation, aggregate, masked_sum, require_shape
from egspo_lightning.ops.schedules import ChordMu
from egspo_lightning.ops.token_methods import TokenMethod, weights_of_step
from egspo_lightning.ops.token_view import TokenView, view_of
from egspo_lightning.types import (
    AboveOne,
    ExpertBatch,
    NetworkOutputs,
    NonNegativeFloat,
    PositiveFloat,
    RolloutBatch,
    ShareBelowOne,
    UnitInterval,
    UpdateSize,
)


class Coefficients(NamedTuple):
    """Weights of the loss terms at one optimizer step, from schedules and adaptive coefficients."""

    mu: float
    """Weight of the SFT loss."""
    policy: float = 1.0
    """Factor of all policy losses: 0 during the critic's warm-up."""
    value: float = 0.0
    """c_v, weight of the value loss; the module adds that loss."""
    entropy: float = 0.0
    """c_h, weight of the entropy bonus."""


@dataclass(frozen=True)
class Objective:
    """Loss of the policy, with its hyperparameters.

    Args:
        epsilon_low: Lower clip of the ratio, at 1 - epsilon_low; in [0, 1).
        epsilon_high: Upper clip of the ratio, at 1 + epsilon_high; above epsilon_low it is DAPO's clip-higher.
        low_branch_epsilon_low: Lower clip for low-entropy tokens; null is epsilon_low.
        low_branch_epsilon_high: Upper clip for low-entropy tokens; null is epsilon_high.
        dual_clip: Bound of the ratio where A < 0, above 1; null sets none.
        rescale_weights: Divide the token weights by their mean over the rollout batch, as computed with the sampling
            policy.
        low_branch: Loss of low-entropy tokens. ppo is the method. nll (ablation) maximizes their likelihood and
            ignores the advantage.
        mu: Weight of the expert data in stage EGSPO, in [0, 1]: 0 is pure RL, 1 pure SFT; or CHORD's schedule of it.
        sft_weighting: Loss of demonstrations in stage SFT: plain, or dft, which weights tokens by their probability p.
            loss/sft is the weighted loss.
        expert_weighting: Loss of demonstrations in stage EGSPO: plain; confidence, which weights tokens by CHORD's
            p (1 - p); dft; or srft, which weights demonstrations by exp(-mean entropy) / 2.
        expert_surrogate: Loss of expert solutions among the rollouts: shaped is LUFFY's -A p / (p + expert_shaping),
            nll is -A log p.
        expert_shaping: gamma of LUFFY's p / (p + gamma), above 0.
        beta: Weight of the KL to the reference policy, which is the policy at the end of SFT; 0 adds no KL.
        kl_estimator: k1, abs, k2, k3 or k3+ (the value of k3 with the gradient of k2).
        aggregation: Aggregation of surrogate and KL, which share N; the entropy bonus is always a mean over tokens.
            seq-mean-token-sum-norm divides by the sequences times max_completion_length.
        mask_truncated: Leave completions that reached the length limit out of the loss, its normalizer and the gate;
            their rewards still count for the others of their group.
        sampler_correction: Importance weights for an engine that samples from another distribution than the trainer's.
    """

    epsilon_low: ShareBelowOne = 0.2
    epsilon_high: NonNegativeFloat = 0.2
    low_branch_epsilon_low: ShareBelowOne | None = None
    low_branch_epsilon_high: NonNegativeFloat | None = None
    dual_clip: AboveOne | None = None
    rescale_weights: bool = False
    low_branch: Literal["ppo", "nll"] = "ppo"
    mu: ChordMu | UnitInterval = 0.1  # order matters: jsonargparse shows the errors in this order
    sft_weighting: Literal["plain", "dft"] = "plain"
    expert_weighting: ExpertWeighting = "plain"
    expert_surrogate: Literal["shaped", "nll"] = "shaped"
    expert_shaping: PositiveFloat = 0.1
    beta: NonNegativeFloat = 0.0
    kl_estimator: KLEstimator = "k3+"
    aggregation: Aggregation = "token-mean"
    mask_truncated: bool = False
    sampler_correction: SamplerCorrection = SamplerCorrection()  # noqa: RUF009  frozen, so it can be shared

    def __post_init__(self) -> None:
        if self.low_branch == "nll" and (self.low_branch_epsilon_low, self.low_branch_epsilon_high) != (None, None):
            raise UserError(
                "model.objective.low_branch_epsilon_low and low_branch_epsilon_high clip ratios, and "
                "model.objective.low_branch: nll has none. Leave them out, or set low_branch to ppo."
            )
        if self.expert_weighting != "plain" and not self.mixes_expert_data:
            raise UserError(
                f"model.objective.expert_weighting: {self.expert_weighting} weights expert data, and "
                "model.objective.mu = 0 mixes none in. Set mu above 0, or expert_weighting to plain."
            )

    @property
    def mixes_expert_data(self) -> bool:
        """Whether mu is ever above 0."""
        return max(self.mu.peak, self.mu.valley) > 0 if isinstance(self.mu, ChordMu) else self.mu > 0

    @property
    def changed_low_branch(self) -> list[str]:
        """Names of the changed fields that have no effect without a low branch."""
        return self._changed("low_branch", "low_branch_epsilon_low", "low_branch_epsilon_high")

    @property
    def changed_clip_settings(self) -> list[str]:
        """Names of the changed fields that have no effect with a surrogate other than PPO's."""
        return self._changed("epsilon_low", "epsilon_high", "dual_clip") + self.changed_low_branch

    def _changed(self, *names: str) -> list[str]:
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    @property
    def needs_every_rollout(self) -> bool:
        """Whether rollouts of advantage 0 have a gradient in this loss."""
        return self.beta > 0 or self.low_branch == "nll"

    def mu_at(self, step: int) -> float:
        """mu after ``step`` optimizer steps of stage EGSPO."""
        return float(self.mu.at(step) if isinstance(self.mu, ChordMu) else self.mu)

    def hybrid_loss(
        self,
        current: NetworkOutputs,
        rollout: RolloutBatch,
        method: TokenMethod,
        expert_loss: Tensor | None,
        weights: Coefficients,
    ) -> tuple[Tensor, Metrics]:
        """Return L without the value loss, and metrics, for one micro-batch.

        ``expert_loss`` is the SFT loss of its demonstrations; None leaves the SFT term out.
        """
        size, mask = rollout.update_size, rollout.gated_mask
        terms = {"loss/egspo": (1 - weights.mu, self.egspo_loss(current, rollout, method))}
        if expert_loss is not None:
            terms["loss/sft"] = (weights.mu, expert_loss)
        if rollout.ref_logprobs is not None:
            kl = kl_penalty(current.logprobs, rollout.ref_logprobs, self.kl_estimator)
            terms["loss/kl"] = (self.beta, self._reduce(kl, mask, size))
        if weights.entropy > 0:  # in nats a token, whatever the aggregation
            mean_entropy = masked_sum(current.entropies, mask) / max(size.num_sampled_tokens, 1.0)
            terms["loss/entropy"] = (-weights.entropy, mean_entropy)
        loss = weights.policy * torch.stack([weight * term for weight, term in terms.values()]).sum()
        metrics = {name: term.detach() for name, (_, term) in terms.items()}
        metrics |= policy_metrics(current.logprobs.detach(), rollout, self.epsilon_low, self.epsilon_high)
        return loss, metrics

    def egspo_loss(self, current: NetworkOutputs, rollout: RolloutBatch, method: TokenMethod) -> Tensor:
        """L_EGSPO: the surrogate, weighted token by token; expert solutions take their own surrogate, unweighted."""
        tokens = view_of(rollout, current, method.over_ranks, threshold=rollout.threshold)
        high_weights, low_weights = rollout.high_weights, rollout.low_weights
        if method.weights.each_step:
            high_weights, low_weights = weights_of_step(method.weights, tokens)
        high = self._high_branch(tokens, method)
        low = self._low_branch(tokens, high)
        gated = high_weights * high + low_weights * low  # g_t, the sum of both weights, multiplies the surrogate here
        per_token = self._corrected(gated * rollout.weight_scale, rollout)
        size = rollout.update_size
        has_expert_rows = size.num_sampled_tokens < size.num_active_tokens
        if has_expert_rows:
            expert = self._expert(current.logprobs, rollout.advantages)
            per_token = torch.where(rollout.is_expert.unsqueeze(1), expert, per_token)
        return self._reduce(per_token, rollout.loss_mask, size)

    def _expert(self, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """The per-token loss of expert solutions."""
        if self.expert_surrogate == "nll":
            return advantages * nll(logprobs)
        return off_policy(logprobs, advantages, shaping=self.expert_shaping)

    def _high_branch(self, tokens: TokenView, method: TokenMethod) -> Tensor:
        """The per-token loss of the full update.

        Raises:
            UserError: the method's surrogate gives another shape.
        """
        if method.surrogate is None:
            return self._ppo(tokens, self.epsilon_low, self.epsilon_high)
        per_token = method.surrogate.per_token(tokens)
        require_shape(per_token, tokens.mask, f"model.surrogate: {type(method.surrogate).__name__} must give a loss")
        return per_token

    def _ppo(self, tokens: TokenView, clip_low: float, clip_high: float) -> Tensor:
        old, advantages, dual_clip = tokens.old_logprobs, tokens.advantages, self.dual_clip
        return ppo_clip(tokens.logprobs, old, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)

    def _low_branch(self, tokens: TokenView, high: Tensor) -> Tensor:
        """The per-token loss of low-entropy tokens; ``high`` itself where both branches have the same loss."""
        if self.low_branch == "nll":
            return nll(tokens.logprobs)
        clip_low, clip_high = self.low_branch_epsilon_low, self.low_branch_epsilon_high
        if clip_low is None and clip_high is None:
            return high
        return self._ppo(
            tokens,
            self.epsilon_low if clip_low is None else clip_low,
            self.epsilon_high if clip_high is None else clip_high,
        )

    def _corrected(self, per_token: Tensor, rollout: RolloutBatch) -> Tensor:
        """The surrogate times the importance weights of ``ops.correction``."""
        correction, sampled = self.sampler_correction, rollout.sampled_logprobs
        if correction.mode == "off" or sampled is None:
            return per_token
        ratios = sampler_ratios(rollout.old_logprobs, sampled, rollout.gated_mask, level=correction.level)
        return per_token * sampler_weights(ratios, mode=correction.mode, cap=correction.cap)

    def _reduce(self, per_token: Tensor, mask: Tensor, size: UpdateSize) -> Tensor:
        divisor = size.num_tokens if self.aggregation == "token-mean" else size.num_sequences
        if self.aggregation == "seq-mean-token-sum-norm":
            divisor = divisor * size.max_length
        return aggregate(per_token, mask, self.aggregation, normalizer=max(divisor, 1.0))


def sft_loss(
    logprobs: Tensor, expert: ExpertBatch, *, weighting: ExpertWeighting, entropies: Tensor | None = None
) -> Tensor:
    """L_SFT: negative log-likelihood of the expert's completion tokens, always token-mean over the optimizer step.

    Args:
        logprobs: (B, T) under the current policy, at temperature 1, with gradient
        weighting: detached weights of the tokens, see ``ops.expert_methods.expert_nll``
        entropies: (B, T) of the current policy, for srft
    """
    per_token = expert_nll(logprobs, weighting, mask=expert.completion_mask, entropies=entropies)
    return _token_mean(per_token, expert.completion_mask, expert.update_size)


def value_loss(values: Tensor, rollout: RolloutBatch, *, clip: float | None) -> tuple[Tensor, Metrics]:
    """L_V and metrics: the critic's clipped error, token-mean over the step; see ``ops.losses.value_clip``."""
    assert rollout.old_values is not None
    assert rollout.returns is not None
    per_token = value_clip(values, rollout.old_values, rollout.returns, clip=clip)
    loss = _token_mean(per_token, rollout.loss_mask, rollout.update_size)
    return loss, {"loss/value": loss.detach()} | value_metrics(values.detach(), rollout, clip)


def _token_mean(per_token: Tensor, mask: Tensor, size: UpdateSize) -> Tensor:
    return aggregate(per_token, mask, "token-mean", normalizer=max(size.num_tokens, 1.0))
