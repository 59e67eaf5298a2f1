r"""Importance weights for rollouts that an engine sampled from a distribution other than the trainer's pi_old.

Engines and trainers round differently, so tokens come from a distribution ``sampler`` near pi_old. Importance weights
correct the surrogate, an expectation under pi_old::

    w_t = pi_old(y_t | x_t) / sampler(y_t | x_t)                  by token
    w   = prod_t w_t                                              by sequence, the same at each of its tokens
    w   = (prod_t w_t)^(1/T)                                      geometric mean of the sequence

    truncated:  c = min(w, cap)                                   (Ionides 2008, "Truncated Importance Sampling")
    masked:     c = w where 1 / cap <= w <= cap, else 0           (both sides, as IcePop, arXiv 2510.18855)

``g_t min( r_t A_t, ... )`` becomes ``c_t g_t min( r_t A_t, ... )``, as in TRL and verl. The normalizer N still counts
masked tokens. KL, entropy and value terms are not weighted.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from egspo_lightning.ops.losses import MAX_LOG_RATIO
from egspo_lightning.ops.masking import Values, as_tensor, masked_mean
from egspo_lightning.types import AtLeastOne

Mode = Literal["off", "truncated", "masked"]
Level = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True)
class SamplerCorrection:
    """Weights the surrogate by pi_old / sampler, if the engine reported its log-probabilities.

    Args:
        mode: off; truncated (weights above cap become cap); masked (tokens, or sequences, whose weight is above cap or
            below 1 / cap are dropped).
        level: Weights per token; per sequence, as the product over its tokens (verl, TRL); or geometric, as their
            geometric mean (ms-swift).
        cap: Largest weight, at least 1.
    """

    mode: Mode = "off"
    level: Level = "token"
    cap: AtLeastOne = 2.0


def sampler_ratios(old_logprobs: Values, sampled_logprobs: Values, mask: Tensor, *, level: Level) -> Tensor:
    """w, (B, T), detached: 1 outside the mask, and where the engine reported NaN or an infinite value.

    Args:
        old_logprobs, sampled_logprobs: (B, T), of the trainer's policy at the time of sampling, and of the engine, nats
        mask: (B, T) bool, the tokens that the engine sampled
        level: token, sequence or geometric; the log-ratio is clamped to +-20, for geometric that of each token too
    """
    sampled = as_tensor(sampled_logprobs).detach()
    is_known = mask & sampled.isfinite()
    logs = torch.where(is_known, as_tensor(old_logprobs).detach() - sampled, 0.0)
    if level == "sequence":
        logs = logs.sum(-1, keepdim=True)
    elif level == "geometric":
        logs = masked_mean(logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), mask, -1).unsqueeze(-1)
    return torch.where(mask, logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), 0.0).exp()


def sampler_weights(ratios: Values, *, mode: Mode, cap: float, floor: float | None = None) -> Tensor:
    """c from w, of the same shape.

    ``floor`` is the lower bound: smaller weights become floor if truncated, and 0 if masked. None sets no bound if
    truncated, and 1 / cap if masked; TRL and ms-swift mask without a lower bound, which is a floor of 0.
    """
    ratios = as_tensor(ratios)
    if mode == "off":
        return torch.ones_like(ratios)
    if mode == "truncated":
        return ratios.clamp(min=floor, max=cap)
    return torch.where(is_corrected(ratios, mode=mode, cap=cap, floor=floor), 0.0, ratios)


def is_corrected(ratios: Values, *, mode: Mode, cap: float, floor: float | None = None) -> Tensor:
    """Which weights are truncated or masked, bool."""
    ratios = as_tensor(ratios)
    if mode == "off":
        return torch.zeros_like(ratios, dtype=torch.bool)
    if floor is None:
        floor = 1 / cap if mode == "masked" else 0.0
    return (ratios > cap) | (ratios < floor)
