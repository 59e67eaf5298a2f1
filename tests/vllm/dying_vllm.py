"""VLLMEngine that kills its rank while it samples."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from egspo_lightning.rollout.engine import Request, Sample
from egspo_lightning.rollout.vllm_engine import VLLMEngine
from egspo_lightning.types import Sampling


class DyingVLLM(VLLMEngine):
    """Kills one rank in the second rollout batch, after a part of its completions; ``file`` then exists."""

    def __init__(self, rank: int, file: str, max_model_len: int, kv_cache_gib: float) -> None:
        super().__init__(max_model_len=max_model_len, kv_cache_gib=kv_cache_gib)
        self.rank, self.file, self.num_calls = rank, file, 0

    def stream(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> Iterator[list[tuple[int, Sample]]]:
        """See ``RolloutEngine``."""
        self.num_calls += 1
        batches = super().stream(lm, requests, sampling, eos_ids=eos_ids, pad_id=pad_id)
        yield next(batches)
        if torch.distributed.get_rank() == self.rank and self.num_calls == 2:
            Path(self.file).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from batches
