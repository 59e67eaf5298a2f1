"""VLLMEngine that ends its rank: SIGKILL while it samples, or SIGTERM while it starts."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from egspo_lightning.rollout.engine import Request, Sample
from egspo_lightning.rollout.vllm_engine import VLLMEngine
from egspo_lightning.types import Sampling

LAST_STEP = 5
SECONDS_OF_START = 1.0
"""vLLM takes several seconds more."""
SECONDS_OF_STEP = 1.0
"""The other ranks would sample for longer than a minute."""


class DyingVLLM(VLLMEngine):
    """Ends one rank after five steps of the second rollout batch, or while it starts; ``file`` then exists."""

    def __init__(
        self, rank: int, file: str, max_model_len: int, tensor_parallel_size: int, moment: Literal["sampling", "start"]
    ) -> None:
        super().__init__(max_model_len=max_model_len, kv_cache_gib=0.25, tensor_parallel_size=int(tensor_parallel_size))
        self.rank, self.file, self.moment, self.num_calls = rank, file, moment, 0

    def start(self, lm: Any) -> None:
        """See ``StartingEngine``."""
        if self.moment == "start" and self.is_here:
            from vllm import LLM  # noqa: F401  it takes seconds

            threading.Timer(SECONDS_OF_START, self.end, [signal.SIGTERM]).start()
        super().start(lm)

    def stream(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> Iterator[list[tuple[int, Sample]]]:
        """See ``RolloutEngine``."""
        self.num_calls += 1
        if self.moment == "sampling" and self.num_calls == 2:
            if self.is_here:
                self.end_after_steps()
            elif self.tensor_parallel_size == 1:
                self.slow_down()
        yield from super().stream(lm, requests, sampling, eos_ids=eos_ids, pad_id=pad_id)

    def end_after_steps(self) -> None:
        """Replace vLLM's step by one that counts."""
        assert self.running is not None
        engine, step, num_steps = self.running.engine, self.running.engine.step, 0

        def counting() -> Any:
            nonlocal num_steps
            num_steps += 1
            if num_steps > LAST_STEP:
                self.end(signal.SIGKILL)
            return step()

        engine.step = counting

    def slow_down(self) -> None:
        """Make each of vLLM's steps take as long as those of a large model with many completions."""
        assert self.running is not None
        engine, step = self.running.engine, self.running.engine.step
        engine.step = lambda: (time.sleep(SECONDS_OF_STEP), step())[1]

    @property
    def is_here(self) -> bool:
        """Whether this is the rank that ends."""
        return torch.distributed.get_rank() == self.rank

    def end(self, number: signal.Signals) -> None:
        """Send a signal to this process."""
        Path(self.file).touch()
        os.kill(os.getpid(), number)
