"""VLLMServerEngine that kills its server while it samples."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from egspo_lightning.rollout.engine import Request, Sample
from egspo_lightning.rollout.vllm_server import VLLMServerEngine
from egspo_lightning.types import Sampling


class KillingEngine(VLLMServerEngine):
    """The last rank kills the server in the second rollout batch, after a part of its completions.

    ``file`` then exists. Every request of that batch is long enough that most of them are unfinished.
    """

    def __init__(self, address: str, server: int, file: str) -> None:
        super().__init__(address)
        self.server, self.file, self.num_calls = server, file, 0

    def stream(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> Iterator[list[tuple[int, Sample]]]:
        """See ``RolloutEngine``."""
        self.num_calls += 1
        batches = super().stream(lm, requests, sampling, eos_ids=eos_ids, pad_id=pad_id)
        yield next(batches)
        if torch.distributed.get_rank() == 1 and self.num_calls == 2:
            Path(self.file).touch()
            os.kill(self.server, signal.SIGKILL)
        yield from batches
