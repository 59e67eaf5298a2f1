"""Schedules over optimizer steps."""

import math
from dataclasses import dataclass

from egspo_lightning.errors import require


def chord_mu(step: int, *, warmup_steps: int, decay_steps: int, peak: float, valley: float) -> float:
    """CHORD's weight of the SFT term (arXiv 2508.11408, section 3.2): linear rise, cosine fall, then constant.

    Args:
        step: optimizer steps taken in this stage
        warmup_steps: steps over which mu rises from 0 to ``peak``
        decay_steps: steps over which it then falls to ``valley``
        peak: largest value
        valley: value from ``warmup_steps + decay_steps`` on
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = step - warmup_steps
    if progress >= decay_steps:
        return valley
    return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * progress / decay_steps))


@dataclass(frozen=True)
class ChordMu:
    """CHORD's schedule of mu over the optimizer steps of stage EGSPO, see ``chord_mu``.

    Args:
        warmup_steps: Steps over which mu rises from 0 to peak.
        decay_steps: Steps over which it then falls to valley.
        peak: Largest mu, in [0, 1].
        valley: Last mu, in [0, 1].
    """

    warmup_steps: int = 0
    decay_steps: int = 200
    peak: float = 0.9
    valley: float = 0.05

    def __post_init__(self) -> None:
        for field in ("warmup_steps", "decay_steps"):
            require(getattr(self, field) >= 0, f"model.objective.mu.{field}", getattr(self, field), "at least 0")
        for field in ("peak", "valley"):
            value = getattr(self, field)
            require(0 <= value <= 1, f"model.objective.mu.{field}", value, "in [0, 1]")

    def at(self, step: int) -> float:
        """mu after ``step`` optimizer steps of this stage."""
        return chord_mu(
            step,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            peak=self.peak,
            valley=self.valley,
        )
