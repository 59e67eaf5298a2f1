"""A reward for stopping in time."""

from __future__ import annotations

from collections.abc import Sequence

from egspo_lightning.errors import UserError, require
from egspo_lightning.rewards.functions import Details, Reward


class SoftLengthPenalty(Reward):
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): what a completion near the limit costs.

        R = -min(max((length - (limit - buffer)) / buffer, 0), 1)

    0 up to ``data.max_completion_length - buffer`` tokens, from there linearly down to -1 at the limit.

    Args:
        buffer: Tokens before the limit over which the penalty grows, at least 1.

    Raises:
        UserError: buffer is out of its range.
    """

    def __init__(self, buffer: int) -> None:
        require(buffer >= 1, "data.reward: SoftLengthPenalty.buffer", buffer, "at least 1 token")
        self.buffer = buffer

    def require_fit(self, max_completion_length: int) -> None:
        """Refuse a buffer that is longer than completions can be.

        Raises:
            UserError: it is.
        """
        if self.buffer > max_completion_length:
            raise UserError(
                f"data.reward: SoftLengthPenalty.buffer = {self.buffer} is more than data.max_completion_length = "
                f"{max_completion_length}, so every completion would be punished. Lower buffer."
            )

    def __call__(
        self, completions: Sequence[str], golds: Sequence[str], details: Sequence[Details] = ()
    ) -> list[float]:
        """Score completions, in their order, by their ``details`` alone.

        Raises:
            ValueError: there are not as many of them as completions.
        """
        return [-self._share(detail) for _, detail in zip(completions, details, strict=True)]

    def _share(self, detail: Details) -> float:
        excess = detail.num_tokens - (detail.max_completion_length - self.buffer)
        return min(max(excess / self.buffer, 0.0), 1.0)
