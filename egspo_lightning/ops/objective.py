r"""THE LOSS. One update of stage EGSPO, read from top to bottom::

    L        = (1 - mu) L_EGSPO  +  mu L_SFT  +  beta KL(pi || pi_ref)
    L_EGSPO  = -(1/N) sum_t  g_t min( r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t )
    r_t      = pi(y_t | s_t) / pi_old(y_t | s_t)
    g_t      = 1 if H_t >= tau else phi_t                       (detached)
    L_SFT    = -(1/N_expert) sum_t log pi(y*_t | s*_t)

after EGSPO (arXiv 2602.03309), of which only the abstract was at hand; what it leaves open is chosen by config:

- H_t is the entropy of the policy that sampled, at the sampling temperature, frozen over the PPO epochs.
- tau comes from a ``Gate``, once a rollout collection, over all ranks; phi from an ``Attenuation``.
- The gate multiplies the surrogate alone. A_t stands in both branches, so that a wrong trajectory pushes down its
  confident tokens too; it enters ungated, after any whitening.
- N counts the whole update: the completion tokens (or sequences, by ``aggregation``) of all micro-batches and ranks.
  Micro-batch losses therefore add up to the loss of the update, however it is split.

Each value returned here is such a part: summed over the micro-batches and ranks of an update it is the update's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from egspo_lightning.errors import UserError
from egspo_lightning.ops.gate import Attenuation, high_entropy_mask, token_weights
from egspo_lightning.ops.losses import KLEstimator, clipped_tokens, kl_penalty, log_ratio, nll, ppo_clip
from egspo_lightning.ops.masking import Aggregation, aggregate, masked_sum
from egspo_lightning.types import ExpertBatch, RolloutBatch, UpdateSize

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """The hyperparameters of the loss; calling it computes the loss and nothing else.

    Args:
        epsilon_low: The ratio is clipped below at 1 - epsilon_low, in [0, 1).
        epsilon_high: The ratio is clipped above at 1 + epsilon_high; above epsilon_low it is DAPO's clip-higher.
        dual_clip: Bound of the ratio where A < 0, above 1; none by default.
        mu: Weight of the expert data in stage EGSPO, in [0, 1]: 0 is pure RL, 1 pure SFT.
        beta: Weight of the KL to the reference policy, which is the policy at the end of SFT; 0 keeps no reference.
        kl_estimator: k1, abs, k2, k3 or k3+ (the value of k3 with the gradient of k2).
        aggregation: Of the surrogate and the KL: token-mean, seq-mean-token-mean, seq-mean-token-sum or
            seq-mean-token-sum-norm (which divides by the sequences times max_completion_length).
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    mu: float = 0.1
    beta: float = 0.0
    kl_estimator: KLEstimator = "k3+"
    aggregation: Aggregation = "token-mean"

    def __post_init__(self) -> None:
        _require(0 <= self.epsilon_low < 1, "epsilon_low", self.epsilon_low, "in [0, 1)")
        _require(self.epsilon_high >= 0, "epsilon_high", self.epsilon_high, "at least 0")
        _require(self.dual_clip is None or self.dual_clip > 1, "dual_clip", self.dual_clip, "above 1, or null")
        _require(0 <= self.mu <= 1, "mu", self.mu, "in [0, 1]")
        _require(self.beta >= 0, "beta", self.beta, "at least 0")

    def hybrid_loss(
        self, logprobs: Tensor, rollout: RolloutBatch, attenuation: Attenuation, expert_loss: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        """L, for a micro-batch of rollouts and the SFT loss of the expert micro-batch that goes with it, if any."""
        surrogate, metrics = self.egspo_loss(logprobs, rollout, attenuation)
        loss = (1 - self.mu) * surrogate
        metrics["loss/egspo"] = surrogate.detach()
        if expert_loss is not None:
            loss = loss + self.mu * expert_loss
            metrics["loss/sft"] = expert_loss.detach()
        if rollout.ref_logprobs is not None:
            kl = self._reduce(
                kl_penalty(logprobs, rollout.ref_logprobs, self.kl_estimator),
                rollout.completion_mask,
                rollout.update_size,
            )
            loss = loss + self.beta * kl
            metrics["loss/kl"] = kl.detach()
        return loss, metrics

    def egspo_loss(self, logprobs: Tensor, rollout: RolloutBatch, attenuation: Attenuation) -> tuple[Tensor, Metrics]:
        """L_EGSPO: the clipped surrogate, gated token by token.

        Args:
            logprobs: (B, T) under the current policy, with gradient
            rollout: the micro-batch
            attenuation: gives phi
        """
        weights = gate_weights(rollout, attenuation)
        per_token = ppo_clip(
            logprobs,
            rollout.old_logprobs,
            rollout.advantages,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            dual_clip=self.dual_clip,
        )
        loss = self._reduce(weights * per_token, rollout.completion_mask, rollout.update_size)
        return loss, self._policy_metrics(logprobs.detach(), rollout)

    def sft_loss(self, logprobs: Tensor, expert: ExpertBatch) -> Tensor:
        """L_SFT: the negative log-likelihood of the expert's completion tokens, token-mean whatever ``aggregation``.

        Args:
            logprobs: (B, T) under the current policy, at temperature 1, with gradient
            expert: the micro-batch
        """
        size = max(expert.update_size.num_tokens, 1.0)
        return aggregate(nll(logprobs), expert.completion_mask, "token-mean", normalizer=size)

    def _reduce(self, per_token: Tensor, mask: Tensor, size: UpdateSize) -> Tensor:
        divisor = size.num_tokens if self.aggregation == "token-mean" else size.num_sequences
        if self.aggregation == "seq-mean-token-sum-norm":
            divisor = divisor * size.max_length
        return aggregate(per_token, mask, self.aggregation, normalizer=max(divisor, 1.0))

    @torch.no_grad()
    def _policy_metrics(self, logprobs: Tensor, rollout: RolloutBatch) -> Metrics:
        below, above = clipped_tokens(
            logprobs,
            rollout.old_logprobs,
            rollout.advantages,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
        )
        log_r = log_ratio(logprobs, rollout.old_logprobs)
        mask, num_tokens = rollout.completion_mask, max(rollout.update_size.num_active_tokens, 1.0)
        return {
            "policy/approx_kl": masked_sum(-log_r, mask) / num_tokens,
            "policy/clip_fraction_low": masked_sum(below.float(), mask) / num_tokens,
            "policy/clip_fraction_high": masked_sum(above.float(), mask) / num_tokens,
        }


def gate_weights(rollout: RolloutBatch, attenuation: Attenuation) -> Tensor:
    """``g_t``, (B, T), detached; see ``ops.gate.token_weights``."""
    phi = attenuation.phi(rollout.old_logprobs, rollout.entropies, rollout.threshold)
    return token_weights(rollout.entropies, rollout.threshold, phi)


def gate_sums(rollout: RolloutBatch, attenuation: Attenuation) -> Metrics:
    """Sums over the completion tokens of a collection, to be added over ranks before they are divided."""
    mask = rollout.completion_mask
    high = high_entropy_mask(rollout.entropies, mask, rollout.threshold)
    return {
        "tokens": mask.sum().float(),
        "high": high.sum().float(),
        "weight": masked_sum(gate_weights(rollout, attenuation), mask),
        "entropy": masked_sum(rollout.entropies, mask),
        "entropy_high": masked_sum(rollout.entropies, high),
    }


def gate_metrics(sums: Metrics) -> Metrics:
    """What the gate did to a collection, from its ``gate_sums``."""
    tokens, high = sums["tokens"].clamp(min=1), sums["high"]
    return {
        "gate/high_fraction": high / tokens,
        "gate/weight_mean": sums["weight"] / tokens,
        "gate/weight_sum": sums["weight"],
        "policy/entropy": sums["entropy"] / tokens,
        "policy/entropy_high": sums["entropy_high"] / high.clamp(min=1),
        "policy/entropy_low": (sums["entropy"] - sums["entropy_high"]) / (sums["tokens"] - high).clamp(min=1),
    }


def _require(holds: bool, field: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"model.objective.{field} must be {allowed}, got {value}.")
