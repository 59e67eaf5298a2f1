r"""Correction for rollouts that an engine sampled from a distribution other than the trainer's pi_old.

Engines round otherwise than trainers do (other kernels, bfloat16, a quantized cache), so that tokens come from some mu
near pi_old. Each term of the surrogate is an expectation under pi_old, and is weighed by what mu missed::

    w_t = pi_old(y_t | x_t) / mu(y_t | x_t)                       by token
    w   = prod_t w_t                                              by sequence, the same at each of its tokens

    truncated:  c = min(w, cap)                                   (Ionides 2008, "Truncated Importance Sampling")
    masked:     c = w where 1 / cap <= w <= cap, else 0           (both sides, as IcePop, arXiv 2510.18855)

and g_t min( r_t A_t, ... ) becomes c_t g_t min( r_t A_t, ... ), as in TRL and verl, by token or by
sequence. The normalizer N still counts what is masked, and KL, entropy and value terms are not weighed.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

import torch
from torch import Tensor

from egspo_lightning.errors import require
from egspo_lightning.ops.losses import MAX_LOG_RATIO, log_ratio
from egspo_lightning.ops.masking import Values, as_tensor

Mode = Literal["off", "truncated", "masked"]
Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class SamplerCorrection:
    """Weighs the surrogate by pi_old / mu, where an engine's log-probabilities came with the rollouts.

    Args:
        mode: off; truncated (weights above cap are cap); masked (tokens, or sequences, whose weight is above cap or
            below 1 / cap are dropped).
        level: Weights by token, or by sequence, the product of those of its tokens.
        cap: Largest weight, at least 1.
    """

    mode: Mode = "off"
    level: Level = "token"
    cap: float = 2.0

    def __post_init__(self) -> None:
        field = "model.objective.sampler_correction"
        require(self.mode in get_args(Mode), f"{field}.mode", self.mode, f"one of {', '.join(get_args(Mode))}")
        require(self.level in get_args(Level), f"{field}.level", self.level, f"one of {', '.join(get_args(Level))}")
        require(1 <= self.cap < inf, f"{field}.cap", self.cap, "at least 1")


def sampler_ratios(old_logprobs: Values, sampled_logprobs: Values, mask: Tensor, *, level: Level) -> Tensor:
    """w, (B, T), detached: 1 outside the mask, and where the engine told nothing (NaN or infinite).

    Args:
        old_logprobs: (B, T), of the trainer's policy at the time of sampling, nats
        sampled_logprobs: (B, T), as the engine told them, nats
        mask: (B, T) bool, the tokens that the engine sampled
        level: by token or by sequence; log-ratios are clamped to +-20, of a token as of a sequence
    """
    sampled = as_tensor(sampled_logprobs).detach()
    told = mask & sampled.isfinite()
    logs = torch.where(told, log_ratio(as_tensor(old_logprobs).detach(), sampled), 0.0)
    if level == "sequence":
        total = logs.sum(-1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        logs = torch.where(mask, total, 0.0)
    return logs.exp()


def sampler_weights(ratios: Values, *, mode: Mode, cap: float) -> Tensor:
    """c from w, of the same shape."""
    ratios = as_tensor(ratios)
    if mode == "off":
        return torch.ones_like(ratios)
    if mode == "truncated":
        return ratios.clamp(max=cap)
    return torch.where(is_corrected(ratios, mode=mode, cap=cap), 0.0, ratios)


def is_corrected(ratios: Values, *, mode: Mode, cap: float) -> Tensor:
    """Which weights are truncated or masked, bool."""
    ratios = as_tensor(ratios)
    if mode == "off":
        return torch.zeros_like(ratios, dtype=torch.bool)
    return (ratios > cap) | ((ratios < 1 / cap) if mode == "masked" else torch.zeros_like(ratios, dtype=torch.bool))
