"""Per-token losses, unreduced: (B, T) in, (B, T) out. ``ops.masking.aggregate`` reduces them."""

from typing import Literal, get_args

import torch
from torch import Tensor

from egspo_lightning.ops.masking import Values, as_floats, as_tensor

KLEstimator = Literal["k1", "abs", "k2", "k3", "k3+"]

MAX_LOG_RATIO = 20.0
"""Bound of log-ratios before exp, so that no ratio overflows."""
MAX_K3 = 10.0


def log_ratio(logprobs: Values, old_logprobs: Values) -> Tensor:
    """``log(pi / pi_old)`` of each token, nats, clamped to +-20."""
    return (as_tensor(logprobs) - as_tensor(old_logprobs)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ppo_clip(
    logprobs: Values,
    old_logprobs: Values,
    advantages: Values,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate as a loss: ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``.

    Sources: PPO, arXiv 1707.06347, equation 7. Separate bounds ("clip-higher"): DAPO, arXiv 2503.14476. Dual clip,
    which bounds the loss by ``-dual_clip A`` where A < 0: arXiv 1912.09729, equation 5.
    """
    ratio = log_ratio(logprobs, old_logprobs).exp()
    return clipped_surrogate(ratio, as_tensor(advantages), 1 - clip_low, 1 + clip_high, dual_clip)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: Tensor | float, high: Tensor | float, dual_clip: float | None = None
) -> Tensor:
    """``-min(r A, clip(r, low, high) A)`` of given ratios, as ``ppo_clip``; bounds may differ by token."""
    clipped_ratio = ratio.clamp(min=low).clamp(max=high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    return dual_clipped(loss, advantages, dual_clip)


def dual_clipped(loss: Tensor, advantages: Tensor, dual_clip: float | None) -> Tensor:
    """The loss, at most ``-dual_clip A`` where A < 0; None sets no bound."""
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def clipped_tokens(
    logprobs: Values, old_logprobs: Values, advantages: Values, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Tokens without a gradient because their ratio left the trust region, as (below, above), both bool.

    These are tokens below ``1 - clip_low`` with A < 0, and tokens above ``1 + clip_high`` with A > 0.
    """
    advantages = as_tensor(advantages)
    ratio = log_ratio(logprobs, old_logprobs).exp()
    return (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)


def nll(logprobs: Values) -> Tensor:
    """Negative log-likelihood of each token, nats: the SFT loss."""
    return -as_tensor(logprobs)


def value_clip(values: Values, old_values: Values, returns: Values, *, clip: float | None) -> Tensor:
    """Half the squared error of the critic, with clipped steps as in PPO.

    ``0.5 max( (V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2 )`` (PPO2 of OpenAI baselines; as in verl). The
    gradient is 0 where V has already moved by ``clip`` towards R.

    Args:
        values: (B, T), with gradient
        old_values, returns: (B, T), of the critic at the time of sampling, and the targets
        clip: largest step, in units of the return; None does not clip
    """
    values, old_values, returns = as_floats(values), as_floats(old_values), as_floats(returns)
    error = (values - returns).square()
    if clip is not None:
        clipped = values.clamp(old_values - clip, old_values + clip)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error


def off_policy(logprobs: Values, advantages: Values, *, shaping: float) -> Tensor:
    """LUFFY's surrogate for an expert's tokens, as a loss: ``-f(p) A`` with ``f(p) = p / (p + shaping)``.

    The expert's own probabilities are taken as 1 and nothing is clipped. The shaping gives the largest gradient to
    tokens that are unlikely under the policy (arXiv 2504.14945, section 3.3).

    ``shaping`` is the paper's gamma, above 0.
    """
    probability = as_tensor(logprobs).exp()
    return -probability / (probability + shaping) * as_tensor(advantages)


def kl_penalty(logprobs: Values, ref_logprobs: Values, estimator: KLEstimator) -> Tensor:
    """Single-sample estimate of ``KL(pi || pi_ref)`` at each token, nats (http://joschu.net/blog/kl-approx.html).

    With ``d = log pi - log pi_ref``: k1 = d; abs = |d|; k2 = d^2 / 2; k3 = exp(-d) + d - 1, its exponent clamped to
    +-20 and its value to +-10. As losses k1 and k3 have the wrong gradient (k1's is 0 in expectation). "k3+" has the
    value of k3 and the gradient of k2, which is the gradient of the KL where the policy is the sampling policy.
    """
    difference = as_tensor(logprobs) - as_tensor(ref_logprobs)
    match estimator:
        case "k1":
            return difference
        case "abs":
            return difference.abs()
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            return _k3(difference)
        case "k3+":
            k2 = 0.5 * difference.square()
            return _k3(difference).detach() + k2 - k2.detach()
    raise ValueError(f"estimator must be one of {', '.join(get_args(KLEstimator))}, got {estimator!r}")


def _k3(difference: Tensor) -> Tensor:
    exponent = (-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (exponent.exp() - exponent - 1).clamp(-MAX_K3, MAX_K3)
