"""HAPO: clip ranges and advantages that depend on each token's entropy (arXiv 2509.16591)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from egspo_lightning.ops.losses import clipped_surrogate
from egspo_lightning.ops.surrogates import unclipped_ratio
from egspo_lightning.ops.token_methods import Surrogate
from egspo_lightning.ops.token_view import Statistics, TokenView
from egspo_lightning.types import AboveOne, NonNegativeFloat, ShareBelowOne, UnitInterval

MIN_ENTROPY = 1e-8


def relative_entropies(entropies: Tensor, mask: Tensor, *, pivot: float, over_ranks: Statistics) -> Tensor:
    """h of each token, (B, T), detached: -1 at the lowest entropy, 0 at the pivot, 1 at the highest.

    ``h = d / max d`` where d >= 0 and ``-d / min d`` where d < 0, with ``d = ln max(H, 1e-8) - q``. q is the quantile
    ``pivot`` of the logarithms, without interpolation. The paper also divides d by its spread, which cancels. Outside
    the mask h has no meaning.
    """
    logs = entropies.detach().clamp(min=MIN_ENTROPY).log()
    ordered = over_ranks.values(logs, mask).sort().values
    if ordered.numel() == 0:
        return torch.zeros_like(logs)
    center = ordered[round(pivot * (ordered.numel() - 1))]
    smallest = torch.finfo(logs.dtype).tiny
    highest = (ordered[-1] - center).clamp(min=smallest)
    lowest = (center - ordered[0]).clamp(min=smallest)
    distance = logs - center
    return (distance / torch.where(distance < 0, lowest, highest)).clamp(-1.0, 1.0)


def clip_widths(h: Tensor, *, clip_low: float, clip_high: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Widths of each token's clip: (lower, wider where h < 0; upper, wider where h > 0).

    ``clip_low (1 + alpha max(-h, 0))`` and ``clip_high (1 + alpha max(h, 0))``
    """
    return clip_low * (1 + alpha * (-h).clamp(min=0)), clip_high * (1 + alpha * h.clamp(min=0))


def redistributed_advantages(
    h: Tensor, ratio: Tensor, advantages: Tensor, low: Tensor | float, high: Tensor | float, *, beta: float
) -> Tensor:
    """``A (1 + beta h)`` where it acts, else A.

    It acts on tokens of low entropy (h <= 0) whose ratio is near 1, and on tokens of high entropy whose ratio is not.
    Near 1 is within half the widths ``low`` and ``high``.
    """
    is_near = (ratio > 1 - low / 2) & (ratio < 1 + high / 2)
    return torch.where(is_near == (h <= 0), advantages * (1 + beta * h), advantages)


@dataclass(frozen=True)
class HAPO(Surrogate):
    """HAPO: low-entropy tokens may fall further, high-entropy tokens may rise further, and advantages follow.

    Follows the paper. The authors' code divides negative h by a negative number, so that its h is never below 0 and
    the rules for low entropy do not act. Statistics are over the tokens of a micro-batch on all ranks (theirs: of one
    rank). Entropies are those of the current policy.

    Args:
        pivot: Quantile of the log-entropies that divides low from high, in [0, 1].
        clip_alpha: How much wider a clip gets, relative to its width; 0 leaves the clips as they are.
        advantage_beta: How much advantages change, relative to their size; 0 leaves them as they are.
        epsilon_low: Lower clip of the ratio at the pivot, at 1 - epsilon_low.
        epsilon_high: Upper clip of the ratio at the pivot, at 1 + epsilon_high.
        dual_clip: Bound of the ratio where A < 0, above 1; null sets none.
    """

    pivot: UnitInterval = 0.8
    clip_alpha: UnitInterval = 1.0
    advantage_beta: UnitInterval = 1.0
    epsilon_low: ShareBelowOne = 0.2
    epsilon_high: NonNegativeFloat = 0.2
    dual_clip: AboveOne | None = 10.0
    needs_current_entropies: ClassVar[bool] = True
    needs_every_rollout: ClassVar[bool] = True
    """Rollouts of advantage 0 count in the quantile."""

    def per_token(self, tokens: TokenView) -> Tensor:
        """The loss of each token, (B, T)."""
        h = relative_entropies(tokens.current_entropies, tokens.mask, pivot=self.pivot, over_ranks=tokens.over_ranks)
        return self.loss(tokens.logprobs, tokens.old_logprobs, tokens.advantages, h)

    def loss(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, h: Tensor) -> Tensor:
        """The clipped surrogate with each token's own clip and advantage, from h. (B, T)"""
        ratio = unclipped_ratio(logprobs, old_logprobs)
        widths = {"clip_low": self.epsilon_low, "clip_high": self.epsilon_high}
        low, high = clip_widths(h, alpha=self.clip_alpha, **widths)
        changed = redistributed_advantages(h, ratio, advantages, low, high, beta=self.advantage_beta)
        return clipped_surrogate(ratio, changed, 1 - low, 1 + high, self.dual_clip)
