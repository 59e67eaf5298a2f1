"""Grader that kills its process during an evaluation."""

import os
import signal
from collections.abc import Sequence

from egspo_lightning.rewards.grading import MathGrader


class DyingGrader(MathGrader):
    """Kills its process before it grades batch ``num_batches``, as the out-of-memory killer does."""

    def __init__(self, num_batches: int) -> None:
        super().__init__()
        self.num_batches = num_batches

    def equivalence_classes(self, groups: Sequence[Sequence[str | None]]) -> list[list[int | None]]:
        self.num_batches -= 1
        if self.num_batches == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().equivalence_classes(groups)
