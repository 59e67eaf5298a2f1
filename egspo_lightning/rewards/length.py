"""Length penalty for completions near the length limit."""

from __future__ import annotations

from collections.abc import Sequence

from egspo_lightning.errors import UserError
from egspo_lightning.rewards.functions import Details, Reward
from egspo_lightning.types import Count


class SoftLengthPenalty(Reward):
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13) near the length limit.

        R = -min(max((length - (limit - buffer)) / buffer, 0), 1)

    0 up to ``data.max_completion_length - buffer`` tokens, from there linearly down to -1 at the limit.

    Args:
        buffer: Tokens before the limit over which the penalty grows, at least 1.
    """

    def __init__(self, buffer: Count) -> None:
        self.buffer = buffer

    def require_fit(self, max_completion_length: int) -> None:
        """Check that the buffer is no longer than completions can be.

        Raises:
            UserError: it is longer.
        """
        if self.buffer > max_completion_length:
            raise UserError(
                f"data.reward: SoftLengthPenalty.buffer = {self.buffer} is more than data.max_completion_length = "
                f"{max_completion_length}, so every completion would be punished. Lower buffer."
            )

    def __call__(
        self, completions: Sequence[str], golds: Sequence[str], details: Sequence[Details] = ()
    ) -> list[float]:
        """Score completions, in their order, from their ``details`` alone.

        Raises:
            ValueError: the numbers of completions and details differ.
        """
        return [-self._share(detail) for _, detail in zip(completions, details, strict=True)]

    def _share(self, detail: Details) -> float:
        excess = detail.num_tokens - (detail.max_completion_length - self.buffer)
        return min(max(excess / self.buffer, 0.0), 1.0)
