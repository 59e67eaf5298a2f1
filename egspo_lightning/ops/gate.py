"""The entropy gate: which tokens take the full update, and by how much the others are attenuated.

The weight of a token is ``g_t = 1 if H_t >= tau else phi_t`` (EGSPO, arXiv 2602.03309). A ``Gate`` gives tau, an
``Attenuation`` gives phi; both are swapped in the config by ``class_path``. Nothing here carries a gradient.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from egspo_lightning.errors import UserError
from egspo_lightning.ops.masking import Values, as_tensor


def quantile_threshold(entropies: Values, mask: Values, top_fraction: float) -> Tensor:
    """Entropy from which a token is among the ``top_fraction`` most uncertain of the masked tokens, nats.

    tau is the ``1 - top_fraction`` quantile with linear interpolation (arXiv 2506.01939 and TRL use the same). An
    empty mask gives +inf: nothing is high. By sorting, so that there is no limit to the number of tokens.

    Args:
        entropies: any shape, nats
        mask: the same shape
        top_fraction: in (0, 1]
    """
    entropies = as_tensor(entropies).detach()
    values = entropies[as_tensor(mask).bool()].sort().values
    if values.numel() == 0:
        return torch.full((), torch.inf, dtype=entropies.dtype, device=entropies.device)
    position = (1 - top_fraction) * (values.numel() - 1)
    below = min(int(position), values.numel() - 1)
    above = min(below + 1, values.numel() - 1)
    return torch.lerp(values[below], values[above], position - below)


def high_entropy_mask(entropies: Values, mask: Values, threshold: Tensor | float) -> Tensor:
    """Which masked tokens have ``H_t >= tau``; a token at the threshold is high. Bool, shape of ``entropies``."""
    return (as_tensor(entropies).detach() >= threshold) & as_tensor(mask).bool()


def token_weights(entropies: Values, threshold: Tensor | float, phi: Values | float) -> Tensor:
    """``g_t``: 1 on high-entropy tokens, ``phi_t`` on the others; detached."""
    entropies = as_tensor(entropies).detach()
    phi = torch.as_tensor(phi, dtype=entropies.dtype, device=entropies.device).detach()
    return torch.where(entropies >= threshold, torch.ones_like(entropies), phi.expand_as(entropies))


def confidence_phi(old_logprobs: Values) -> Tensor:
    """CHORD's phi: ``p_t (1 - p_t)`` with ``p_t = pi_old(y_t)`` (arXiv 2508.11408, equation 6); in [0, 1/4].

    It vanishes where the policy is certain of its token and where it thinks it impossible; detached.
    """
    p = as_tensor(old_logprobs).detach().exp()
    return p * (1 - p)


class Gate(Protocol):
    """Settles tau once a rollout collection, before its first update."""

    def threshold(self, entropies: Tensor) -> Tensor:
        """tau in nats, a scalar.

        Args:
            entropies: (N,), all completion tokens of the collection, over all ranks
        """
        ...


class Attenuation(Protocol):
    """Gives phi, the weight of the low-entropy tokens."""

    def phi(self, old_logprobs: Tensor, entropies: Tensor, threshold: Tensor) -> Tensor:
        """phi per token, (B, T), at least 0; also asked for at high tokens, where it is not used.

        Args:
            old_logprobs: (B, T), nats
            entropies: (B, T), nats
            threshold: (), nats
        """
        ...


@dataclass(frozen=True)
class QuantileGate:
    """tau is the quantile over all completion tokens of the collection, on all ranks (ours; default).

    Args:
        top_fraction: share of tokens that count as high, in (0, 1].
    """

    top_fraction: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.top_fraction <= 1:
            raise UserError(
                f"QuantileGate.top_fraction must be in (0, 1], got {self.top_fraction}. "
                "The share of tokens that take the full update is meant: 0.2 is the top 20 %."
            )

    def threshold(self, entropies: Tensor) -> Tensor:
        """tau in nats, a scalar; see ``quantile_threshold``."""
        return quantile_threshold(entropies, torch.ones_like(entropies, dtype=torch.bool), self.top_fraction)


@dataclass(frozen=True)
class AbsoluteGate:
    """tau is a fixed entropy.

    Args:
        nats: the threshold, at least 0.
    """

    nats: float

    def __post_init__(self) -> None:
        if self.nats < 0:
            raise UserError(f"AbsoluteGate.nats must be at least 0, got {self.nats}. Entropies are never negative.")

    def threshold(self, entropies: Tensor) -> Tensor:
        """The fixed tau, a scalar."""
        return entropies.new_tensor(self.nats)


@dataclass(frozen=True)
class OpenGate:
    """Every token is high: the gate is off, and the objective is plain PPO."""

    def threshold(self, entropies: Tensor) -> Tensor:
        """-inf."""
        return entropies.new_tensor(-torch.inf)


@dataclass(frozen=True)
class ConfidenceAttenuation:
    """phi = p (1 - p), CHORD's (default)."""

    def phi(self, old_logprobs: Tensor, entropies: Tensor, threshold: Tensor) -> Tensor:
        """See ``confidence_phi``."""
        return confidence_phi(old_logprobs)


@dataclass(frozen=True)
class ConstantAttenuation:
    """phi is the same for every low-entropy token: 0 drops them ("80/20"), 1 is plain PPO.

    Args:
        value: phi, in [0, 1]; above 1 the low-entropy tokens would weigh more than the high ones.
    """

    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise UserError(f"ConstantAttenuation.value must be in [0, 1], got {self.value}.")

    def phi(self, old_logprobs: Tensor, entropies: Tensor, threshold: Tensor) -> Tensor:
        """phi everywhere."""
        return torch.full_like(old_logprobs, self.value)
