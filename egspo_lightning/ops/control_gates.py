"""Gates of an ablation: they select as many tokens as ``QuantileGate``, by another rule than high entropy.

tau stays the quantile of the entropies, for attenuations that use it and for the metrics.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from egspo_lightning.ops.gate import Entropies, Gate, highest_share
from egspo_lightning.ops.token_view import TokenView
from egspo_lightning.types import NonNegativeInt, PositiveShare


@dataclass(frozen=True)
class RandomGate(Gate):
    """Control: a random share of the tokens takes the full update, drawn anew for each rollout batch.

    The draw depends on the seed, the number of the rollout batch and the place of the token; the number of ranks does
    not matter.

    Args:
        top_fraction: Share of tokens that take the full update, in (0, 1].
        seed: Names the draw.
    """

    top_fraction: PositiveShare = 0.2
    seed: NonNegativeInt = 0
    by_entropy: ClassVar[bool] = False

    def threshold(self, entropies: Entropies) -> Tensor:
        """The quantile of the entropies, nats, a scalar."""
        return entropies.threshold(self.top_fraction)

    def is_high(self, tokens: TokenView, threshold: Tensor) -> Tensor:
        """Random tokens, (B, T) bool."""
        seed = (int(self.seed) << 32) + tokens.number
        return highest_share(torch.zeros_like(tokens.entropies), tokens, self.top_fraction, seed=seed)


@dataclass(frozen=True)
class InverseGate(Gate):
    """Control: the tokens with the lowest entropy take the full update.

    Args:
        top_fraction: Share of tokens that take the full update, in (0, 1].
    """

    top_fraction: PositiveShare = 0.2
    by_entropy: ClassVar[bool] = False

    def threshold(self, entropies: Entropies) -> Tensor:
        """The quantile of the entropies, nats, a scalar."""
        return entropies.threshold(self.top_fraction)

    def is_high(self, tokens: TokenView, threshold: Tensor) -> Tensor:
        """The tokens with the lowest entropy, (B, T) bool."""
        return highest_share(-tokens.entropies, tokens, self.top_fraction)


@dataclass(frozen=True)
class PositionGate(Gate):
    """Control: the tokens at one end of their completion take the full update.

    Tokens are ordered by their relative position, ``(position + 1/2) / length``.

    Args:
        top_fraction: Share of tokens that take the full update, in (0, 1].
        end: The end of the completion that they stand at.
    """

    top_fraction: PositiveShare = 0.2
    end: Literal["first", "last"] = "first"
    by_entropy: ClassVar[bool] = False

    def threshold(self, entropies: Entropies) -> Tensor:
        """The quantile of the entropies, nats, a scalar."""
        return entropies.threshold(self.top_fraction)

    def is_high(self, tokens: TokenView, threshold: Tensor) -> Tensor:
        """The first or last tokens of the completions, (B, T) bool."""
        lengths = tokens.mask.sum(-1, keepdim=True).clamp(min=1)
        relative = (tokens.positions + 0.5) / lengths
        return highest_share(relative if self.end == "last" else -relative, tokens, self.top_fraction)
