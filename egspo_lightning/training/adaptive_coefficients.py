"""Coefficients that follow what they control, from one rollout collection to the next."""

import math
from dataclasses import dataclass, field
from typing import Any

from egspo_lightning.errors import UserError, require
from egspo_lightning.ops.losses import KLEstimator

MAX_KL_ERROR = 0.2
"""Largest relative error of the KL that a single correction answers to."""


class _Followed:
    """A coefficient that starts at ``coefficient`` and, where there is a target, follows it."""

    coefficient: float
    target: float | None
    _current: float

    @property
    def current(self) -> float:
        """The coefficient as it is now."""
        return self._current

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {"current": self._current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it, where it follows a target."""
        if self.target is not None:
            self._current = state["current"]


@dataclass
class KLReward(_Followed):
    """KL to the reference as a part of the reward: ``r_t - coefficient KL_t``, by the policy that sampled.

    With a target the coefficient follows the collection's mean KL (arXiv 1909.08593, section 2.2)::

        coefficient <- coefficient (1 + clip(KL / target - 1, -0.2, 0.2) min(n / horizon, 1))

    Args:
        coefficient: Of the KL, or its first value where there is a target; above 0.
        target: KL to keep to, nats a token, above 0; null keeps the coefficient.
        horizon: Completions over which an error of 100 % would be answered in full, were it not clipped.
        estimator: Of the KL at a token: k1, abs, k2, k3.
    """

    coefficient: float = 1e-3
    target: float | None = None
    horizon: int = 10_000
    estimator: KLEstimator = "k1"

    _current: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        require(0 < self.coefficient < math.inf, "model.kl_reward.coefficient", self.coefficient, "above 0")
        require(self.target is None or self.target > 0, "model.kl_reward.target", self.target, "above 0, or null")
        require(self.horizon >= 1, "model.kl_reward.horizon", self.horizon, "at least 1")
        if self.estimator == "k3+":
            raise UserError("model.kl_reward.estimator k3+ differs from k3 in its gradient, and rewards have none: k3.")
        self._current = self.coefficient

    def update(self, kl: float, num_completions: int) -> None:
        """Answer to the mean KL, nats a token, of a collection over all ranks."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
            self._current *= 1 + error * min(num_completions / self.horizon, 1.0)


@dataclass
class EntropyBonus(_Followed):
    """Reward for the policy's own entropy, as a term ``-coefficient H`` of the loss.

    With a target the coefficient rises by ``step`` after a collection of less entropy, and falls by it, not below 0,
    after one of more (after Skywork-OR1, arXiv 2505.22312, section 4; it starts at ``coefficient`` there too).

    Args:
        coefficient: c_h, or, where there is a target, its value before the first collection; at least 0.
        target: Entropy to keep to, nats a token; null keeps the coefficient.
        step: Change of the coefficient a collection.
    """

    coefficient: float = 1e-3
    target: float | None = None
    step: float = 1e-3

    _current: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        require(0 <= self.coefficient < math.inf, "model.entropy_bonus.coefficient", self.coefficient, "at least 0")
        require(self.target is None or self.target > 0, "model.entropy_bonus.target", self.target, "above 0, or null")
        require(0 < self.step < math.inf, "model.entropy_bonus.step", self.step, "above 0")
        if self.coefficient == 0 and self.target is None:
            raise UserError(
                "model.entropy_bonus.coefficient is 0 and .target is null, so there is no bonus. Set one of them, or "
                "leave model.entropy_bonus out."
            )
        self._current = self.coefficient

    def update(self, entropy: float) -> None:
        """Answer to the mean entropy, nats a token, of a collection over all ranks."""
        if self.target is not None:
            self._current = max(self._current + (self.step if entropy < self.target else -self.step), 0.0)
