"""A reward for stopping in time."""

import math
from dataclasses import dataclass

from egspo_lightning.errors import UserError
from egspo_lightning.types import Completion


@dataclass(frozen=True)
class SoftLengthPenalty:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), taken off the reward.

    0 up to ``max_completion_length - buffer`` tokens, from there linearly up to ``weight`` at the limit.

    Args:
        buffer: Tokens before the limit over which the penalty grows, at least 1.
        weight: Penalty of a completion that reaches the limit, above 0.
    """

    buffer: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.buffer < 1:
            raise UserError(f"data.length_penalty.buffer must be at least 1 token, got {self.buffer}.")
        if not 0 < self.weight < math.inf:
            raise UserError(f"data.length_penalty.weight must be above 0, got {self.weight}.")

    def apply(self, completion: Completion, max_length: int) -> Completion:
        """The completion, with the penalty taken off its reward."""
        excess = len(completion.token_ids) - (max_length - self.buffer)
        penalty = self.weight * min(max(excess / self.buffer, 0.0), 1.0)
        return completion._replace(reward=completion.reward - penalty) if penalty else completion
