"""Adaptive coefficients: KL reward and entropy bonus, updated once for each rollout batch."""

from dataclasses import dataclass, field
from typing import Any

from egspo_lightning.errors import UserError
from egspo_lightning.ops.losses import KLEstimator
from egspo_lightning.types import NonNegativeFloat, PositiveFloat, PositiveInt

MAX_KL_ERROR = 0.2
"""Bound of the relative error of the KL in one correction."""


@dataclass
class _Adaptive:
    """A coefficient that starts at ``coefficient`` and is adapted where there is a target."""

    coefficient: NonNegativeFloat = 1e-3
    target: PositiveFloat | None = None
    current: float = field(default=0.0, init=False, repr=False)
    """The present coefficient."""

    def __post_init__(self) -> None:
        self.current = float(self.coefficient)

    def state_dict(self) -> dict[str, Any]:
        """The present coefficient, for checkpoints."""
        return {"current": self.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the coefficient where there is a target; otherwise the config's value holds."""
        if self.target is not None:
            self.current = state["current"]


@dataclass
class KLReward(_Adaptive):
    """KL penalty in the reward: ``r_t - coefficient KL_t``, of the sampling policy to the reference policy.

    With a target the coefficient adapts to the mean KL of each rollout batch (arXiv 1909.08593, section 2.2)::

        coefficient <- coefficient (1 + clip(KL / target - 1, -0.2, 0.2) min(n / horizon, 1))

    Args:
        coefficient: Weight of the KL, above 0; with a target, its first value.
        target: Mean KL to aim at, nats per token, above 0; null keeps the coefficient constant.
        horizon: Completions after which an error of 100 % would double the coefficient, were it not clipped.
        estimator: Estimator of the KL at a token: k1, abs, k2, k3.
    """

    coefficient: PositiveFloat = 1e-3
    horizon: PositiveInt = 10_000
    estimator: KLEstimator = "k1"

    def __post_init__(self) -> None:
        if self.estimator == "k3+":
            raise UserError(
                "model.kl_reward.estimator must not be k3+: it differs from k3 in its gradient alone, and rewards have "
                "no gradient. Set it to k3."
            )
        super().__post_init__()

    def update(self, kl: float, num_completions: int) -> None:
        """Adapt to the mean KL of a rollout batch over all ranks, nats per token."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
            self.current *= 1 + error * min(num_completions / self.horizon, 1.0)


@dataclass
class EntropyBonus(_Adaptive):
    """Entropy bonus: a term ``-coefficient H`` of the loss.

    With a target the coefficient rises by ``step`` after a rollout batch with less entropy than the target. It falls by
    ``step``, not below 0, after one with more (after Skywork-OR1, arXiv 2505.22312, section 4).

    Args:
        coefficient: c_h, at least 0; with a target, its value before the first rollout batch.
        target: Entropy to aim at, nats per token, above 0; null keeps the coefficient constant.
        step: Change of the coefficient per rollout batch, above 0.
    """

    step: PositiveFloat = 1e-3

    def __post_init__(self) -> None:
        if self.coefficient == 0 and self.target is None:
            raise UserError(
                "model.entropy_bonus.coefficient is 0 and .target is null, so there is no bonus. Set one of them, or "
                "leave model.entropy_bonus out."
            )
        super().__post_init__()

    def update(self, entropy: float) -> None:
        """Adapt to the mean entropy of a rollout batch over all ranks, nats per token."""
        if self.target is not None:
            self.current = max(self.current + (self.step if entropy < self.target else -self.step), 0.0)
