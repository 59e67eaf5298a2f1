"""Starting and ending vLLM within this process, without what it does to the rest of the process."""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from egspo_lightning.checkpointing.random_state import random_state, restore_random_state
from egspo_lightning.errors import UserError

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Set before vLLM is imported, where the user has not."""

CPU_CACHE_GIB = 1


class Running(NamedTuple):
    """vLLM in this process."""

    llm: Any
    """A ``vllm.LLM``."""
    owns_group: bool
    """Whether it made torch's process group."""

    @property
    def engine(self) -> Any:
        """What takes requests and steps."""
        return self.llm.llm_engine

    @property
    def model(self) -> Any:
        """The module whose weights it samples from."""
        return self.engine.model_executor.driver_worker.model_runner.model

    def close(self) -> bool:
        """End it, and say whether that was possible: it would end a process group of the trainer's as well."""
        if self.owns_group:
            self.engine.engine_core.shutdown()
        return self.owns_group


def start_vllm(lm: Any, device: torch.device, settings: Mapping[str, Any]) -> Running:
    """vLLM with a causal language model's architecture, and weights that are still to come.

    Python's, NumPy's and torch's random generators, which vLLM seeds, are left as they were.

    Args:
        lm: the model
        device: where it is
        settings: further arguments of ``vllm.LLM``

    Raises:
        UserError: there are several processes, the model is not on the first GPU, or vLLM cannot run it.
    """
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if has_group and (num_ranks := torch.distributed.get_world_size()) > 1:
        raise UserError(
            f"data.engine VLLMEngine runs on one process as yet, and this run has {num_ranks}. Use --trainer.devices 1 "
            "and --trainer.num_nodes 1, or the default engine."
        )
    if device.type == "cuda" and device.index not in (None, 0):
        raise UserError(
            f"data.engine VLLMEngine takes the first GPU that it sees, and the policy is on {device}. Choose the GPU "
            f"by CUDA_VISIBLE_DEVICES={device.index}, with --trainer.devices 1."
        )
    with undisturbed(), TemporaryDirectory() as folder:
        config = copy.deepcopy(lm.config)
        config.architectures = [type(lm).__name__]
        config.save_pretrained(folder)
        from vllm import LLM

        try:
            llm = LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,  # it is given ids, and gives ids
                generation_config="vllm",  # no filter or penalty that the folder might ask for
                logprobs_mode="processed_logprobs",  # at the sampling temperature
                **(_for_cpu(settings) if device.type == "cpu" else settings),
            )
        except ValueError as error:
            reason = " ".join(str(error).split())[:400]
            raise UserError(f"data.engine VLLMEngine: vLLM cannot run {type(lm).__name__}: {reason}") from error
    return Running(llm, not has_group)


def _for_cpu(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Compile nothing, take little memory, and keep weights where they are.

    vLLM would pack them for oneDNN, and what is copied afterwards would not reach the packed ones.
    """
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False
    room = settings["kv_cache_memory_bytes"] or CPU_CACHE_GIB * 2**30
    return {**settings, "enforce_eager": True, "kv_cache_memory_bytes": room}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave random generators, and ``torch.set_num_threads``, which vLLM's CPU worker replaces, as they were."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where its weights can be reached
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    state, set_num_threads = random_state(), torch.set_num_threads
    try:
        yield
    finally:
        restore_random_state(state)
        torch.set_num_threads = set_num_threads


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Step without the trainer's autocast and without drawing from its generators, as vLLM does beside its own."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False):
        yield
