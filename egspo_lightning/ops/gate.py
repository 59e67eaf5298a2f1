"""Gates: which tokens take the full update.

The weight of a token is ``g_t = 1 if H_t >= tau else phi_t`` (EGSPO, arXiv 2602.03309). A ``Gate`` gives tau; an
``Attenuation`` (``ops.attenuation``) gives phi. ``ops.entropy_gate`` joins them. The controls of an ablation, which
select as many tokens by another rule, are in ``ops.control_gates``. All results are detached.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from egspo_lightning.errors import UserError
from egspo_lightning.ops.masking import Values, as_tensor, quantile
from egspo_lightning.ops.token_selection import highest, num_above_quantile, token_hash
from egspo_lightning.ops.token_view import Statistics, TokenView
from egspo_lightning.types import NonNegativeFloat, PositiveShare, ShareBelowOne


def quantile_threshold(entropies: Values, mask: Values, top_fraction: float) -> Tensor:
    """Threshold tau of the ``top_fraction`` masked tokens with the highest entropy, nats; a scalar.

    tau is the ``1 - top_fraction`` quantile with linear interpolation, as in arXiv 2506.01939 and TRL. An empty mask
    gives +inf, so no token is high. It sorts, because ``torch.quantile`` limits the number of tokens.

    Args:
        entropies, mask: of one shape; entropies in nats
        top_fraction: in (0, 1]
    """
    entropies = as_tensor(entropies).detach()
    values = entropies[as_tensor(mask).bool()].sort().values
    if values.numel() == 0:
        return torch.full((), torch.inf, dtype=entropies.dtype, device=entropies.device)
    return quantile(values, 1 - top_fraction)


def high_entropy_mask(entropies: Values, mask: Values, threshold: Tensor | float) -> Tensor:
    """Which masked tokens have ``H_t >= tau``; a token at the threshold is high. Bool, shape of ``entropies``."""
    return (as_tensor(entropies).detach() >= threshold) & as_tensor(mask).bool()


def token_weights(entropies: Values, threshold: Tensor | float, phi: Values | float) -> Tensor:
    """``g_t``: 1 on high-entropy tokens, ``phi_t`` on the others; detached."""
    entropies = as_tensor(entropies).detach()
    phi = torch.as_tensor(phi, dtype=entropies.dtype, device=entropies.device).detach()
    return torch.where(entropies >= threshold, torch.ones_like(entropies), phi.expand_as(entropies))


def soft_share(entropies: Tensor, threshold: Tensor | float, width: float) -> Tensor:
    """``s_t = sigmoid((H_t - tau) / width)`` (ours), the share of a token that takes the full update; detached.

    ``width`` is in nats, above 0.
    """
    return torch.sigmoid((entropies.detach() - threshold) / width)


def confidence_phi(old_logprobs: Values) -> Tensor:
    """CHORD's phi: ``p_t (1 - p_t)`` with ``p_t = pi_old(y_t)`` (arXiv 2508.11408, equation 6); in [0, 1/4].

    Near 0 for tokens that are nearly certain or very unlikely; detached.
    """
    p = as_tensor(old_logprobs).detach().exp()
    return p * (1 - p)


def highest_share(scores: Tensor, tokens: TokenView, fraction: float, *, seed: int = 0) -> Tensor:
    """The ``fraction`` of the tokens of all ranks with the highest scores, (B, T) bool, exact to one token.

    As many tokens as a quantile selects of distinct scores; ``seed`` names the order of equal scores. Collective.
    """
    num = num_above_quantile(fraction, tokens.mask, tokens.over_ranks)
    return highest(scores, token_hash(tokens, seed), tokens.mask, num, tokens.over_ranks)


class Entropies(NamedTuple):
    """Entropies of a rollout batch, the input of a gate."""

    rows: Tensor
    """(B, T), nats: this rank's completions"""
    mask: Tensor
    """(B, T) bool: tokens that the policy sampled"""
    pooled: Tensor
    """(N,), nats: the completion tokens of all ranks"""

    def threshold(self, top_fraction: float) -> Tensor:
        """``quantile_threshold`` of the completion tokens of all ranks."""
        return quantile_threshold(self.pooled, torch.ones_like(self.pooled, dtype=torch.bool), top_fraction)


class Gate(Protocol):
    """Gives tau once for each rollout batch, before its first optimizer step.

    A gate that keeps state between rollout batches has ``state_dict`` and ``load_state_dict``; checkpoints save it.
    """

    @abstractmethod
    def threshold(self, entropies: Entropies) -> Tensor:
        """tau in nats: a scalar, or (B, 1) with one value for each of this rank's completions."""


@runtime_checkable
class SelectsTokens(Protocol):
    """A ``Gate`` that selects the tokens that take the full update itself; others select those with ``H_t >= tau``."""

    by_entropy: ClassVar[bool]
    """Whether it selects the tokens with ``H_t >= tau``, except where entropies are equal."""

    def is_high(self, tokens: TokenView, threshold: Tensor) -> Tensor:
        """Which tokens take the full update, (B, T) bool; entries outside ``tokens.mask`` have no meaning.

        Args:
            tokens: the rollout batch
            threshold: tau, () or (B, 1), nats
        """


@dataclass
class QuantileGate(Gate):
    """tau is a quantile of the entropies of a rollout batch (default: over all its tokens, on all ranks; ours).

    Exactly ``top_fraction`` of the tokens are high, to one token. Among equal entropies a fixed hash of the token's
    place in the rollout batch decides, which is the same on any number of ranks. With ``running_decay`` all tokens
    with ``H_t >= tau`` are high, however many they are.

    Args:
        top_fraction: Share of tokens that take the full update, in (0, 1]: 0.2 is the top 20 %.
        over: Tokens that are ranked together: those of the whole rollout batch, or of each sequence.
        running_decay: Running mean of the quantile over rollout batches, ``tau <- decay tau + (1 - decay) quantile``,
            in [0, 1); null uses the quantile of each rollout batch.
    """

    top_fraction: PositiveShare = 0.2
    over: Literal["batch", "sequence"] = "batch"
    running_decay: ShareBelowOne | None = None

    by_entropy: ClassVar[bool] = True
    _running: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.running_decay is not None and self.over == "sequence":
            raise UserError(
                f"QuantileGate.running_decay = {self.running_decay} has no meaning with QuantileGate.over = sequence: "
                "no sequence appears twice. Set running_decay to null, or over to batch."
            )

    def threshold(self, entropies: Entropies) -> Tensor:
        """tau in nats, a scalar or (B, 1); see ``quantile_threshold``."""
        if self.over == "sequence":
            rows = zip(entropies.rows, entropies.mask, strict=True)
            return torch.stack([quantile_threshold(row, mask, self.top_fraction) for row, mask in rows]).unsqueeze(1)
        tau = entropies.threshold(self.top_fraction)
        return tau if self.running_decay is None else self._smooth(tau, self.running_decay)

    def is_high(self, tokens: TokenView, threshold: Tensor) -> Tensor:
        """The ``top_fraction`` of the tokens with the highest entropy, (B, T) bool."""
        if self.running_decay is not None:
            return tokens.entropies >= threshold
        if self.over == "batch":
            return highest_share(tokens.entropies, tokens, self.top_fraction)
        rows = zip(tokens.entropies, token_hash(tokens), tokens.mask, strict=True)
        alone = Statistics()
        return torch.stack(
            [highest(*row, num_above_quantile(self.top_fraction, row[-1], alone), alone) for row in rows]
        )

    def _smooth(self, tau: Tensor, decay: float) -> Tensor:
        """Update and return the running mean; a rollout batch without tokens leaves it unchanged."""
        if torch.isfinite(tau):
            latest = tau.item()
            self._running = latest if self._running is None else decay * self._running + (1 - decay) * latest
        return tau if self._running is None else tau.new_tensor(self._running)

    def state_dict(self) -> dict[str, Any]:
        """The running mean."""
        return {"running": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the running mean."""
        self._running = state["running"]


@dataclass(frozen=True)
class AbsoluteGate(Gate):
    """tau is a fixed number of nats.

    Args:
        nats: The threshold, at least 0.
    """

    nats: NonNegativeFloat

    def threshold(self, entropies: Entropies) -> Tensor:
        """The fixed tau, a scalar."""
        return entropies.rows.new_tensor(self.nats)


@dataclass(frozen=True)
class OpenGate(Gate):
    """The gate is off: every token counts as high, and the objective is plain PPO."""

    def threshold(self, entropies: Entropies) -> Tensor:
        """-inf."""
        return entropies.rows.new_tensor(-torch.inf)
