"""Schedules over optimizer steps: mu, the weight of expert data."""

import math
from dataclasses import asdict, dataclass

from egspo_lightning.types import NonNegativeInt, UnitInterval


def chord_mu(step: int, *, warmup_steps: int, decay_steps: int, peak: float, valley: float) -> float:
    """CHORD's weight of the SFT term (arXiv 2508.11408, section 3.2): linear warm-up, cosine decay, then constant.

    ``step`` optimizer steps of this stage are done. The other arguments are those of ``ChordMu``.
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

    warmup_steps: NonNegativeInt = 0
    decay_steps: NonNegativeInt = 200
    peak: UnitInterval = 0.9
    valley: UnitInterval = 0.05

    def at(self, step: int) -> float:
        """mu after ``step`` optimizer steps of this stage."""
        return chord_mu(step, **asdict(self))
