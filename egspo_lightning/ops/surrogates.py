"""Surrogates of other methods in place of PPO's: pure functions, and the classes that a config names.

All give the loss of each token, (B, T), unreduced, with gradient through ``logprobs``.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from egspo_lightning.ops.losses import clipped_surrogate, clipped_tokens, dual_clipped, log_ratio
from egspo_lightning.ops.masking import Values, as_tensor, masked_mean
from egspo_lightning.ops.token_methods import Surrogate
from egspo_lightning.ops.token_selection import advantage_covariance, highest, share_of_tokens, token_hash
from egspo_lightning.ops.token_view import TokenView
from egspo_lightning.types import AboveOne, NonNegativeFloat, PositiveFloat, PositiveShare, ShareBelowOne

MAX_UNCLIPPED_LOG_RATIO = 40.0
"""Bound of log-ratios that no clip follows: the square of exp(40) is finite in float32, so the gradient's norm is."""


def unclipped(logprobs: Values, old_logprobs: Values, advantages: Values) -> Tensor:
    """``-r A``: the surrogate without a clip."""
    return -unclipped_ratio(logprobs, old_logprobs) * as_tensor(advantages)


def unclipped_ratio(logprobs: Values, old_logprobs: Values) -> Tensor:
    """r of each token, with its logarithm clamped to +-40."""
    logs = as_tensor(logprobs) - as_tensor(old_logprobs)
    return logs.clamp(-MAX_UNCLIPPED_LOG_RATIO, MAX_UNCLIPPED_LOG_RATIO).exp()


def cispo(logprobs: Values, old_logprobs: Values, advantages: Values, *, ratio_min: float, ratio_max: float) -> Tensor:
    """CISPO's loss ``-sg(clip(r, ratio_min, ratio_max)) A log pi`` (arXiv 2506.13585)."""
    weights = log_ratio(logprobs, old_logprobs).exp().clamp(ratio_min, ratio_max).detach()
    return -weights * as_tensor(advantages) * as_tensor(logprobs)


def gspo(
    logprobs: Values,
    old_logprobs: Values,
    advantages: Values,
    mask: Values,
    *,
    clip_low: float,
    clip_high: float,
    level: Literal["sequence", "token"],
) -> Tensor:
    """GSPO's clipped surrogate of the sequence's ratio ``s = exp(mean_t log r_t)`` (arXiv 2507.18071).

    At level token the ratio is ``sg(s) pi / sg(pi)``: same value, but the gradient of a token has its own advantage
    alone (GSPO-token). ``mean_t log r_t`` is clamped to +-40.
    """
    logprobs = as_tensor(logprobs)
    logs = masked_mean(logprobs - as_tensor(old_logprobs), mask, -1).unsqueeze(-1)
    logs = logs.clamp(-MAX_UNCLIPPED_LOG_RATIO, MAX_UNCLIPPED_LOG_RATIO)
    if level == "token":
        logs = logs.detach() + logprobs - logprobs.detach()
    return clipped_surrogate(logs.exp(), as_tensor(advantages), 1 - clip_low, 1 + clip_high)


def sapo(logprobs: Values, old_logprobs: Values, advantages: Values, *, tau_pos: float, tau_neg: float) -> Tensor:
    """SAPO's soft clip ``-A (4 / tau) sigmoid(tau (r - 1))`` (arXiv 2511.20347, equations 5 and 6).

    tau is ``tau_pos`` where A > 0, else ``tau_neg``. At r = 1 the gradient with log pi is -A.
    """
    advantages = as_tensor(advantages)
    tau = torch.where(advantages > 0, advantages.new_tensor(tau_pos), tau_neg)
    return -advantages * 4 / tau * torch.sigmoid(tau * (log_ratio(logprobs, old_logprobs).exp() - 1))


def ce_gppo(
    logprobs: Values,
    old_logprobs: Values,
    advantages: Values,
    *,
    clip_low: float,
    clip_high: float,
    beta_low: float,
    beta_high: float,
    dual_clip: float | None,
) -> Tensor:
    """CE-GPPO's surrogate ``-A x``, which keeps a bounded gradient at clipped tokens (arXiv 2509.20712).

    ``x = beta_low (1 - clip_low) r / sg(r)`` where r < 1 - clip_low and A < 0; ``beta_high (1 + clip_high) r / sg(r)``
    where r > 1 + clip_high and A > 0; otherwise r.
    """
    logprobs, advantages = as_tensor(logprobs), as_tensor(advantages)
    below, above = clipped_tokens(logprobs.detach(), old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high)
    slope_one = (logprobs - logprobs.detach()).exp()
    x = torch.where(below, beta_low * (1 - clip_low) * slope_one, unclipped_ratio(logprobs, old_logprobs))
    x = torch.where(above, beta_high * (1 + clip_high) * slope_one, x)
    return dual_clipped(-advantages * x, advantages, dual_clip)


def kl_cov(
    logprobs: Values, old_logprobs: Values, advantages: Values, selected: Tensor, *, coefficient: float
) -> Tensor:
    """KL-Cov's ``-r A``, plus ``coefficient |log r|`` at selected tokens (arXiv 2505.22617)."""
    penalty = (as_tensor(logprobs) - as_tensor(old_logprobs)).abs()
    loss = unclipped(logprobs, old_logprobs, advantages)
    return loss + coefficient * torch.where(selected, penalty, torch.zeros_like(penalty))


@dataclass(frozen=True)
class CISPO(Surrogate):
    """CISPO (MiniMax-M1): the clipped ratio only weights log pi, so every token keeps a gradient; see ``cispo``.

    The bounds are the ratio's own: ``ratio_max`` is TRL's and ms-swift's ``epsilon_high``. verl writes them as
    1 - clip_ratio_low and 1 + clip_ratio_high, and sets a lower bound, which the paper leaves out.

    Args:
        ratio_max: Upper bound of the ratio.
        ratio_min: Lower bound of the ratio; 0 sets none.
    """

    ratio_max: PositiveFloat = 5.0
    ratio_min: NonNegativeFloat = 0.0

    def per_token(self, tokens: TokenView) -> Tensor:
        """The loss of each token, (B, T)."""
        bounds = {"ratio_min": self.ratio_min, "ratio_max": self.ratio_max}
        return cispo(tokens.logprobs, tokens.old_logprobs, tokens.advantages, **bounds)


@dataclass(frozen=True)
class GSPO(Surrogate):
    """GSPO (Qwen): PPO's clip of one ratio for the whole sequence, the geometric mean of its tokens'; see ``gspo``.

    Follows the paper, TRL and ms-swift. verl has level token alone, and bounds the sequence's log-ratio by 10. All of
    them aggregate by seq-mean-token-mean: set ``objective.aggregation`` to it.

    Args:
        epsilon_low: Lower clip of the sequence's ratio, at 1 - epsilon_low.
        epsilon_high: Upper clip of the sequence's ratio, at 1 + epsilon_high.
        level: sequence, or token, where advantages differ by token (GSPO-token). They are equal for advantages that
            are constant in the sequence.
    """

    epsilon_low: ShareBelowOne = 3e-4
    epsilon_high: NonNegativeFloat = 4e-4
    level: Literal["sequence", "token"] = "sequence"

    def per_token(self, tokens: TokenView) -> Tensor:
        """The loss of each token, (B, T); at level sequence, its mean over the sequence is the sequence's loss."""
        return gspo(
            tokens.logprobs,
            tokens.old_logprobs,
            tokens.advantages,
            tokens.mask,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            level=self.level,
        )


@dataclass(frozen=True)
class SAPO(Surrogate):
    """SAPO (Qwen): a sigmoid in place of the clip, see ``sapo``; its sources aggregate by seq-mean-token-mean.

    Args:
        tau_pos: Temperature where A > 0: higher values leave less room around ratio 1.
        tau_neg: Temperature elsewhere.
    """

    tau_pos: PositiveFloat = 1.0
    tau_neg: PositiveFloat = 1.05

    def per_token(self, tokens: TokenView) -> Tensor:
        """The loss of each token, (B, T)."""
        temperatures = {"tau_pos": self.tau_pos, "tau_neg": self.tau_neg}
        return sapo(tokens.logprobs, tokens.old_logprobs, tokens.advantages, **temperatures)


@dataclass(frozen=True)
class CEGPPO(Surrogate):
    """CE-GPPO: clipped tokens keep a scaled gradient, see ``ce_gppo``. Follows the authors' general form.

    Args:
        epsilon_low: Lower clip of the ratio, at 1 - epsilon_low.
        epsilon_high: Upper clip of the ratio, at 1 + epsilon_high.
        beta_low: Scale of tokens that the lower clip would cut.
        beta_high: Scale of tokens that the upper clip would cut.
        dual_clip: Bound of the ratio where A < 0, above 1; null sets none.
    """

    epsilon_low: ShareBelowOne = 0.2
    epsilon_high: NonNegativeFloat = 0.28
    beta_low: NonNegativeFloat = 0.5
    beta_high: NonNegativeFloat = 1.0
    dual_clip: AboveOne | None = 10.0

    def per_token(self, tokens: TokenView) -> Tensor:
        """The loss of each token, (B, T)."""
        return ce_gppo(
            tokens.logprobs,
            tokens.old_logprobs,
            tokens.advantages,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            beta_low=self.beta_low,
            beta_high=self.beta_high,
            dual_clip=self.dual_clip,
        )


@dataclass(frozen=True)
class KLCov(Surrogate):
    """KL-Cov: no clip, and a KL penalty at the tokens with the highest covariance; see ``kl_cov``.

    The covariance is that of advantage and log-probability over the tokens of a micro-batch on all ranks (the
    references take one rank's). Fraction and coefficient are those of the authors and of verl's function.

    Args:
        fraction: Share of tokens with a penalty; at least one token has it.
        coefficient: Weight of the penalty |log r|.
    """

    fraction: PositiveShare = 2e-4
    coefficient: NonNegativeFloat = 1.0
    needs_every_rollout: ClassVar[bool] = True
    """Rollouts of advantage 0 count in the means, and can have the penalty."""

    def per_token(self, tokens: TokenView) -> Tensor:
        """The loss of each token, (B, T)."""
        return kl_cov(
            tokens.logprobs,
            tokens.old_logprobs,
            tokens.advantages,
            self.selected(tokens),
            coefficient=self.coefficient,
        )

    def selected(self, tokens: TokenView) -> Tensor:
        """Tokens with a penalty, (B, T) bool."""
        num = share_of_tokens(self.fraction, tokens.mask, tokens.over_ranks)
        covariance = advantage_covariance(tokens.logprobs, tokens.advantages, tokens.mask, tokens.over_ranks)
        return highest(covariance, token_hash(tokens), tokens.mask, num, tokens.over_ranks)
