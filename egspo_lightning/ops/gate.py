"""The entropy gate: which tokens take the full update, and by how much the others are attenuated.

The weight of a token is ``g_t = 1 if H_t >= tau else phi_t`` (EGSPO, arXiv 2602.03309). A ``Gate`` gives tau, an
``Attenuation`` (``ops.attenuation``) gives phi; both are swapped in the config by ``class_path``. Nothing here carries
a gradient.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

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


def high_share(entropies: Tensor, threshold: Tensor | float, width: float) -> Tensor:
    """``s_t``, the share of a token that is routed as high: ``1 if H_t >= tau else 0``, or with a width, in nats,
    ``sigmoid((H_t - tau) / width)`` (ours), of which the step is the limit; detached.
    """
    entropies = entropies.detach()
    if width == 0:
        return (entropies >= threshold).to(entropies.dtype)
    return torch.sigmoid((entropies - threshold) / width)


def confidence_phi(old_logprobs: Values) -> Tensor:
    """CHORD's phi: ``p_t (1 - p_t)`` with ``p_t = pi_old(y_t)`` (arXiv 2508.11408, equation 6); in [0, 1/4].

    It vanishes where the policy is certain of its token and where it thinks it impossible; detached.
    """
    p = as_tensor(old_logprobs).detach().exp()
    return p * (1 - p)


class Entropies(NamedTuple):
    """What a gate sees of a rollout collection."""

    rows: Tensor
    """(B, T), nats: this rank's completions"""
    mask: Tensor
    """(B, T) bool: their tokens"""
    pooled: Tensor
    """(N,), nats: all completion tokens, of all ranks"""


class Gate(Protocol):
    """Settles tau once a rollout collection, before its first update.

    A gate that remembers something from one collection to the next has ``state_dict`` and ``load_state_dict``, and is
    then saved in checkpoints.
    """

    def threshold(self, entropies: Entropies) -> Tensor:
        """tau in nats: a scalar, or (B, 1) with one for each of this rank's completions."""
        ...


@dataclass
class QuantileGate(Gate):
    """tau is a quantile of the entropies of a collection (default: over all its tokens, on all ranks; ours).

    Args:
        top_fraction: Share of tokens that count as high, in (0, 1].
        over: The tokens that are ranked: those of the whole batch, or of each sequence by itself.
        running_decay: Smooths the batch's quantile over collections, ``tau <- decay tau + (1 - decay) quantile``, in
            [0, 1); null takes each collection's own.
    """

    top_fraction: float = 0.2
    over: Literal["batch", "sequence"] = "batch"
    running_decay: float | None = None

    _running: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.top_fraction <= 1:
            raise UserError(
                f"QuantileGate.top_fraction must be in (0, 1], got {self.top_fraction}. "
                "The share of tokens that take the full update is meant: 0.2 is the top 20 %."
            )
        if self.over not in ("batch", "sequence"):
            raise UserError(f"QuantileGate.over must be batch or sequence, got {self.over!r}.")
        if self.running_decay is not None and not 0 <= self.running_decay < 1:
            raise UserError(f"QuantileGate.running_decay must be in [0, 1), or null, got {self.running_decay}.")
        if self.running_decay is not None and self.over == "sequence":
            raise UserError(
                f"QuantileGate.running_decay = {self.running_decay} with QuantileGate.over = sequence means nothing: "
                "no sequence comes again. Set running_decay to null, or over to batch."
            )

    def threshold(self, entropies: Entropies) -> Tensor:
        """tau in nats, a scalar or (B, 1); see ``quantile_threshold``."""
        if self.over == "sequence":
            rows = zip(entropies.rows, entropies.mask, strict=True)
            return torch.stack([quantile_threshold(row, mask, self.top_fraction) for row, mask in rows]).unsqueeze(1)
        pooled = entropies.pooled
        tau = quantile_threshold(pooled, torch.ones_like(pooled, dtype=torch.bool), self.top_fraction)
        return tau if self.running_decay is None else self._smooth(tau, self.running_decay)

    def _smooth(self, tau: Tensor, decay: float) -> Tensor:
        """The running mean with this collection's quantile in it; a collection without tokens leaves it as it is."""
        if torch.isfinite(tau):
            latest = tau.item()
            self._running = latest if self._running is None else decay * self._running + (1 - decay) * latest
        return tau if self._running is None else tau.new_tensor(self._running)

    def state_dict(self) -> dict[str, Any]:
        """The running mean."""
        return {"running": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._running = state["running"]


@dataclass(frozen=True)
class AbsoluteGate(Gate):
    """tau is a fixed entropy.

    Args:
        nats: The threshold, at least 0.
    """

    nats: float

    def __post_init__(self) -> None:
        if not 0 <= self.nats < math.inf:
            raise UserError(f"AbsoluteGate.nats must be at least 0, got {self.nats}. Entropies are never negative.")

    def threshold(self, entropies: Entropies) -> Tensor:
        """The fixed tau, a scalar."""
        return entropies.rows.new_tensor(self.nats)


@dataclass(frozen=True)
class OpenGate(Gate):
    """Every token is high: the gate is off, and the objective is plain PPO."""

    def threshold(self, entropies: Entropies) -> Tensor:
        """-inf."""
        return entropies.rows.new_tensor(-torch.inf)
