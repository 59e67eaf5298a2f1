"""EGSPO's token weights: ``g_t = 1`` on high-entropy tokens, ``phi_t`` on the others."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from egspo_lightning.errors import UserError
from egspo_lightning.ops.attenuation import Attenuation
from egspo_lightning.ops.gate import Entropies, Gate, SelectsTokens, soft_share
from egspo_lightning.ops.masking import require_shape, shape_of
from egspo_lightning.ops.part_states import States, restore, states_of
from egspo_lightning.ops.token_methods import Branches, TokenWeights
from egspo_lightning.ops.token_view import TokenView
from egspo_lightning.types import NonNegativeFloat


@dataclass(frozen=True)
class EntropyGate(TokenWeights):
    """EGSPO's weights (default): ``g_t = s_t + (1 - s_t) phi_t`` with ``s_t = 1 if H_t >= tau else 0``.

    Source: EGSPO (arXiv 2602.03309), its abstract. tau comes from the gate, phi from the attenuation.

    Args:
        gate: Gives tau, or selects the tokens that take the full update; null is model.gate.
        attenuation: Gives phi, the weight of the other tokens; null is model.attenuation.
        width: Width of a soft gate, in nats: s_t is then sigmoid((H_t - tau) / width). 0 is a hard gate.
        entropy: Whose entropy is compared with tau: that of the sampling policy, frozen over the PPO epochs, or of the
            current policy. They are equal in the first optimizer step on a rollout batch, unless the rollouts were
            sampled ahead. tau itself, and the gate's metrics, always use the sampling policy. With the current policy
            all tokens with H_t >= tau are high, however many they are.
    """

    gate: Gate | None = None
    attenuation: Attenuation | None = None
    width: NonNegativeFloat = 0.0
    entropy: Literal["sampling", "current"] = "sampling"

    def __post_init__(self) -> None:
        selects = isinstance(self.gate, SelectsTokens)
        name = type(self.gate).__name__
        if selects and not self.gate.by_entropy and (self.width > 0 or self.entropy == "current"):  # type: ignore[union-attr]
            field, value = ("width", self.width) if self.width > 0 else ("entropy", self.entropy)
            raise UserError(
                f"EntropyGate.{field} = {value} compares entropies with tau, and {name} selects tokens by another "
                f"rule. Leave {field} out, or choose QuantileGate or AbsoluteGate."
            )

    @property
    def each_step(self) -> bool:
        """True with the entropy of the current policy."""
        return self.entropy == "current"

    @property
    def needs_current_entropies(self) -> bool:
        """True with the entropy of the current policy."""
        return self.entropy == "current"

    def weights(self, tokens: TokenView) -> Tensor:
        """g_t."""
        branches = self.branches(tokens)
        return branches.high + branches.low

    def branches(self, tokens: TokenView) -> Branches:
        """s_t and (1 - s_t) phi_t. An optimizer step compares current entropies with the tau it got."""
        entropies = tokens.current_entropies
        if tokens.threshold is not None:
            tau, is_high = tokens.threshold, entropies >= tokens.threshold
        else:
            tau = self._threshold(tokens)
            is_high = _selected(self.gate, tokens, tau)
        share = is_high.to(entropies.dtype) if self.width == 0 else soft_share(entropies, tau, self.width)
        assert self.attenuation is not None
        phi = self.attenuation.phi(tokens.old_logprobs, entropies, tau)
        require_shape(phi, tokens.mask, f"model.attenuation: {type(self.attenuation).__name__} must give phi")
        low = torch.where(share < 1, (1 - share) * phi.detach(), torch.zeros_like(share))
        return Branches(share, low, is_high, tau)

    def _threshold(self, tokens: TokenView) -> Tensor:
        """tau, () or (B, 1). Collective."""
        assert self.gate is not None
        pooled = tokens.over_ranks.values(tokens.entropies, tokens.mask)
        tau = self.gate.threshold(Entropies(tokens.entropies, tokens.mask, pooled))
        rows = len(tokens.mask)
        if shape_of(tau) not in ((), (1,), (rows, 1)):
            name = type(self.gate).__name__
            raise UserError(f"model.gate: {name} must give tau of shape () or {(rows, 1)}, got {shape_of(tau)}.")
        return tau

    # Checkpoints: the state of gate and attenuation

    @property
    def _parts(self) -> dict[str, Any]:
        return {"gate": self.gate, "attenuation": self.attenuation}

    def state_dict(self) -> States:
        """State of gate and attenuation, with their class names."""
        return states_of(self._parts)

    def load_state_dict(self, state: States) -> None:
        """Restore the state; see ``ops.part_states.restore``."""
        restore(self._parts, state)


def _selected(gate: Gate | None, tokens: TokenView, tau: Tensor) -> Tensor:
    """Tokens that take the full update: by the gate's own rule, or those with ``H_t >= tau``."""
    return gate.is_high(tokens, tau) if isinstance(gate, SelectsTokens) else tokens.entropies >= tau
