"""vLLM in this process: starts it and shuts it down, without side effects on the rest of the process."""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from egspo_lightning.checkpointing.random_state import random_state, restore_random_state
from egspo_lightning.errors import UserError
from egspo_lightning.rollout.rank_watch import ended_by_sigterm, processes_here, watched
from egspo_lightning.rollout.vllm_group import private_shared_memory

ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
"""Environment variables set before vLLM is imported, unless the user has set them."""

CPU_CACHE_GIB = 1


class Running(NamedTuple):
    """A running vLLM instance."""

    llm: Any
    """A ``vllm.LLM``."""
    owns_group: bool
    """Whether it created torch's process group."""

    @property
    def engine(self) -> Any:
        """The engine core, which takes requests and makes steps."""
        return self.llm.llm_engine

    @property
    def model(self) -> Any:
        """The module with vLLM's weights."""
        return self.engine.model_executor.driver_worker.model_runner.model

    @property
    def group(self) -> Any:
        """Process group of the ranks that share the engine, on the CPU."""
        from vllm.distributed.parallel_state import get_tp_group

        return get_tp_group().cpu_group

    def close(self) -> None:
        """Shut vLLM down; a process group that it did not create stays."""
        with nullcontext() if self.owns_group else kept_group():
            self.engine.engine_core.shutdown()


def start_vllm(lm: Any, device: torch.device, settings: Mapping[str, Any]) -> Running:
    """Start vLLM for the architecture of a causal language model, with placeholder weights.

    If there is a process group, all ranks must call this together. Each gets an engine of its own, in its own process
    and on its own device; vLLM cuts its groups from the existing one. Until all have started, SIGTERM ends a rank at
    once, and the end of a rank ends the others. vLLM seeds the random generators of Python, NumPy and torch; their
    states are restored.

    Args:
        lm: the model
        device: device of the model
        settings: further arguments of ``vllm.LLM``

    Raises:
        UserError: one process without a group has the model on another GPU than the first, or vLLM cannot run it.
    """
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not has_group and device.type == "cuda" and device.index not in (None, 0):
        raise UserError(
            f"data.engine VLLMEngine takes the first GPU that it sees, and the policy is on {device}. Choose the GPU "
            f"by CUDA_VISIBLE_DEVICES={device.index}, with --trainer.devices 1."
        )
    with undisturbed(), started_together(device) if has_group else nullcontext(), TemporaryDirectory() as folder:
        config = copy.deepcopy(lm.config)
        config.architectures = [type(lm).__name__]
        config.save_pretrained(folder)
        from vllm import LLM

        try:
            llm = LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,  # requests and samples are token ids
                generation_config="vllm",  # no filter or penalty from the folder's generation config
                logprobs_mode="processed_logprobs",  # at the sampling temperature
                distributed_executor_backend="external_launcher" if has_group else None,
                **(_for_cpu(settings) if device.type == "cpu" else settings),
            )
        except (ValueError, AssertionError) as error:  # vLLM asserts that tensor parallel groups can split the layers
            reason = " ".join(str(error).split())[:400] or "an assertion of vLLM failed"
            raise UserError(f"data.engine VLLMEngine: vLLM cannot run {type(lm).__name__}: {reason}") from error
    return Running(llm, not has_group)


def _for_cpu(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a CPU: no compilation, a small cache, unpacked weights, and whole prompts.

    vLLM would pack weights for oneDNN, and weights copied later would not reach the packed ones. If it took a part of a
    prompt in a step, requests with seeds would end with "CPU Generator does not use offset".
    """
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False
    room = settings["kv_cache_memory_bytes"] or CPU_CACHE_GIB * 2**30
    whole = {"enforce_eager": True, "enable_chunked_prefill": False}
    return {**settings, **whole, "kv_cache_memory_bytes": room}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore random generators, and ``torch.set_num_threads``, which vLLM's CPU worker replaces."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that its weights can be set
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    state, set_num_threads = random_state(), torch.set_num_threads
    try:
        yield
    finally:
        restore_random_state(state)
        torch.set_num_threads = set_num_threads


@contextmanager
def started_together(device: torch.device) -> Iterator[None]:
    """Start the engines of all ranks within the block, in their main threads."""
    with ExitStack() as stack:
        stack.enter_context(ended_by_sigterm())
        stack.enter_context(watched(processes_here()))
        stack.enter_context(launched(device))
        if device.type == "cpu":
            stack.enter_context(private_shared_memory())
        yield


@contextmanager
def launched(device: torch.device) -> Iterator[None]:
    """Set the variables from which vLLM's external_launcher takes this process's rank and the index of its device."""
    values = {"RANK": str(torch.distributed.get_rank()), "LOCAL_RANK": str(device.index or 0)}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


@contextmanager
def kept_group() -> Iterator[None]:
    """Ignore vLLM's call that destroys the default process group, which is the trainer's."""
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda group=None: None if group is None else destroy(group)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Run vLLM without the trainer's autocast, and without drawing from the trainer's random generators."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False):
        yield
