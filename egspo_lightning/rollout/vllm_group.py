"""Tensor parallel groups of vLLM: the ranks of a group sample all their requests together.

Each rank has an engine with a shard of the model and a scheduler of its own. The schedulers stay in step because all of
them get the same requests in the same order and make the same number of steps.
"""

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from egspo_lightning.errors import UserError, require
from egspo_lightning.rollout.engine import Request, Sample
from egspo_lightning.rollout.rank_watch import deadline, gather

OUT_OF_STEP_S = 30.0
"""How long the ranks of a group wait for each other after the last step."""
OUT_OF_STEP = (
    "The ranks of a tensor parallel group of VLLMEngine sampled different tokens for the same requests, so their "
    "engines are out of step. Set data.engine.tensor_parallel_size to 1."
)
Batches = Iterator[list[tuple[int, Sample]]]


def require_group(size: int, num_ranks: int, num_heads: int | None, max_staleness: int) -> None:
    """Refuse tensor parallel groups that do not fit the run; arguments as in ``SelectiveEngine``, and ``size`` ranks.

    Raises:
        UserError: naming the settings that do not fit together, and a remedy.
    """
    if size == 1:
        return
    field = "data.engine.tensor_parallel_size"
    allowed = f"1, or a divisor of the number of ranks, {num_ranks}, which trainer.devices sets"
    require(num_ranks % size == 0, field, size, allowed)
    allowed = f"1, or a divisor of the model's number of attention heads, {num_heads}"
    require(num_heads is None or num_heads % size == 0, field, size, allowed)
    if max_staleness > 0:
        raise UserError(
            f"data.max_staleness = {max_staleness} samples in a thread while the policy trains, and with {field} = "
            f"{size} the threads of {size} ranks would have to communicate meanwhile. Set max_staleness to 0, or "
            "tensor_parallel_size to 1."
        )


def stream_together(
    requests: Sequence[Request],
    stream: Callable[[Sequence[Request]], Batches],
    group: Any,
    is_open: Callable[[], bool],
) -> Batches:
    """Sample the requests of all ranks of a group, and yield this rank's samples. Collective.

    A rank whose consumer stops early makes the remaining steps, which the others wait for. A rank that waits for a dead
    one must be watched (``rank_watch.watched``).

    Args:
        requests: this rank's requests, perhaps none
        stream: samples a list of requests, the same on all ranks of the group
        group: process group of the ranks that share an engine, on the CPU
        is_open: whether the engine still runs; an error of the run closes it

    Raises:
        RuntimeError: the ranks sampled different tokens.
    """
    shares, rank = gather(list(requests), group), torch.distributed.get_rank(group)
    first = sum(map(len, shares[:rank]))
    tokens: dict[int, list[int]] = {}

    def own(batch: list[tuple[int, Sample]]) -> list[tuple[int, Sample]]:
        tokens.update((number, sample.token_ids) for number, sample in batch)
        return [(number - first, sample) for number, sample in batch if 0 <= number - first < len(requests)]

    batches = stream([request for share in shares for request in share])
    try:
        for batch in batches:
            if mine := own(batch):
                yield mine
    except GeneratorExit:
        if is_open():
            for batch in batches:
                own(batch)
            _require_equal(tokens, group)
        raise
    _require_equal(tokens, group)


def _require_equal(tokens: dict[int, list[int]], group: Any) -> None:
    """Compare the tokens of the ranks, which end at the same time; one out of step waits in a step for the others."""
    digest = hashlib.sha256(repr(sorted(tokens.items())).encode()).hexdigest()
    with deadline(OUT_OF_STEP_S, OUT_OF_STEP):
        digests = gather(digest, group)
    if len(set(digests)) > 1:
        raise RuntimeError(OUT_OF_STEP)


@contextmanager
def private_shared_memory() -> Iterator[None]:
    """Give the shared memory of a group on the CPU a name of this run, and remove the name once all ranks have it.

    vLLM's own name is the same in every run, and outlives the run.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    name, join = _CPUSHMDistributed.make_group_name, _CPUSHMDistributed._init_cpu_shm

    def own_name(communicator: Any) -> str:
        return f"{name(communicator)}-{os.environ.get('MASTER_PORT', '')}"

    def join_and_unlink(self: Any) -> int:
        handle: int = join(self)
        for file in Path("/dev/shm").glob(f"{glob.escape(self.group_name.strip('/'))}_*"):
            file.unlink(missing_ok=True)  # another rank may do it as well
        return handle

    _CPUSHMDistributed.make_group_name, _CPUSHMDistributed._init_cpu_shm = staticmethod(own_name), join_and_unlink
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name, _CPUSHMDistributed._init_cpu_shm = staticmethod(name), join
