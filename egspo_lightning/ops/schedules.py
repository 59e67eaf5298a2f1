"""Schedules over optimiser steps."""

import math


def chord_mu(step: int, *, warmup_steps: int, decay_steps: int, peak: float, valley: float) -> float:
    """CHORD's weight of the SFT term (arXiv 2508.11408, section 3.2): linear rise, cosine fall, then constant.

    Args:
        step: optimiser steps taken in this stage
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
