"""Attenuations: phi, the weight of low-entropy tokens, as a config names it."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from egspo_lightning.ops.gate import confidence_phi
from egspo_lightning.types import UnitInterval


class Attenuation(Protocol):
    """Gives phi, the weight of low-entropy tokens."""

    @abstractmethod
    def phi(self, old_logprobs: Tensor, entropies: Tensor, threshold: Tensor) -> Tensor:
        """phi of each token, (B, T), at least 0. The gate ignores it at high-entropy tokens.

        Args:
            old_logprobs, entropies: (B, T), nats
            threshold: () or (B, 1), nats
        """


@dataclass(frozen=True)
class ConfidenceAttenuation(Attenuation):
    """CHORD's ``phi = p (1 - p)`` (default)."""

    def phi(self, old_logprobs: Tensor, entropies: Tensor, threshold: Tensor) -> Tensor:
        """See ``ops.gate.confidence_phi``."""
        return confidence_phi(old_logprobs)


@dataclass(frozen=True)
class ConstantAttenuation(Attenuation):
    """One phi for all low-entropy tokens: 0 drops them ("80/20"), 1 is plain PPO.

    Args:
        value: phi, in [0, 1]; above 1 low-entropy tokens would weigh more than high-entropy ones.
    """

    value: UnitInterval

    def phi(self, old_logprobs: Tensor, entropies: Tensor, threshold: Tensor) -> Tensor:
        """(B, T), constant."""
        return torch.full_like(old_logprobs, self.value)


@dataclass(frozen=True)
class EntropyRatioAttenuation(Attenuation):
    """``phi = H_t / tau``: the weight falls linearly from 1 at the threshold to 0 at entropy 0 (ours)."""

    def phi(self, old_logprobs: Tensor, entropies: Tensor, threshold: Tensor) -> Tensor:
        """In [0, 1]; 0 where tau is 0 or infinite."""
        ratio = entropies / threshold
        return torch.where(torch.isfinite(ratio), ratio, torch.zeros_like(ratio)).clamp(0.0, 1.0)
