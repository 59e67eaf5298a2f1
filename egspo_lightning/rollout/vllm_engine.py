"""vLLM engine: samples with vLLM in the process of each rank, from the trainer's weights.

Each call of ``stream`` first copies the policy's weights into vLLM and resets its prefix cache. So every change of the
policy counts: an optimizer step, a checkpoint, a new stage, adapters, another object. A copy takes milliseconds where
sampling takes seconds. Adapters are merged into the copied weights. Shards of FSDP2 are gathered one parameter at a
time.

On several ranks each has an engine with the whole model, and samples its own requests. The ranks start their engines
and copy weights together; in between they are independent, unless they are a group (``rollout.vllm_group``).

Tested with vLLM 0.32 on one and two CPU processes, in float32. Not tested: CUDA, and therefore ``enable_sleep``,
bfloat16, ``gpu_memory_utilization`` and NCCL.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch

from egspo_lightning.errors import UserError
from egspo_lightning.models.whole_weights import compute_device, compute_dtype, whole_weights
from egspo_lightning.rollout.engine import Request, Reservation, RolloutEngine, Sample
from egspo_lightning.rollout.rank_watch import num_ranks, processes_here, watched
from egspo_lightning.rollout.vllm_group import require_group, stream_together
from egspo_lightning.rollout.vllm_process import Running, apart, start_vllm
from egspo_lightning.rollout.vllm_requests import require_room, require_temperature, sampling_settings
from egspo_lightning.types import Count, PositiveFloat, PositiveShare, Sampling


class VLLMEngine(RolloutEngine):
    """Samples with vLLM; needs ``pip install "egspo-lightning[vllm]"``.

    Each rank has an engine of its own, and its GPU holds the whole model in it, under ``fsdp2`` as well, unless
    ``tensor_parallel_size`` is above 1. A sample depends on its seed and prompt alone, up to rounding, which varies
    with the batch. vLLM reports no entropies, so the policy scores the rollouts; ``rollout/sampler_gap`` logs the
    distance between the two.

    Args:
        gpu_memory_utilization: Share of a GPU's memory for vLLM's weights and cache, in (0, 1]; training takes the
            rest.
        kv_cache_gib: Memory for the cache in GiB, instead of that share; 1 by default on a CPU.
        max_model_len: Longest prompt with its completion, in tokens. By default the model's limit, which a small
            cache may not hold.
        max_num_seqs: Most completions decoded at a time.
        dtype: Type of vLLM's weights; by default the type in which training computes.
        enable_sleep: On a GPU, free vLLM's memory between calls.
        enforce_eager: On a GPU, run without CUDA graphs: slower, with less memory.
        tensor_parallel_size: Number of adjacent ranks that share an engine, each with a shard of the model.
            Experimental: run on two CPU ranks only.
    """

    takes_shards = True
    """All ranks call ``stream`` together, also without requests: copying the weights is collective."""

    def __init__(
        self,
        gpu_memory_utilization: PositiveShare = 0.3,
        kv_cache_gib: PositiveFloat | None = None,
        max_model_len: Count | None = None,
        max_num_seqs: Count = 256,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        enable_sleep: bool = True,
        enforce_eager: bool = False,
        tensor_parallel_size: Count = 1,
    ) -> None:
        # int() and float(): vLLM gets plain numbers rather than the parser's subclasses
        self.gpu_memory_utilization, self.max_num_seqs = float(gpu_memory_utilization), int(max_num_seqs)
        self.kv_cache_gib = None if kv_cache_gib is None else float(kv_cache_gib)
        self.max_model_len = None if max_model_len is None else int(max_model_len)
        self.dtype = dtype
        self.enable_sleep, self.enforce_eager = enable_sleep, enforce_eager
        self.tensor_parallel_size = int(tensor_parallel_size)
        self.running: Running | None = None
        """The vLLM instance, once it has started."""
        self._config = ""
        self._processes: list[int] = []
        """Process ids of the ranks on this machine."""
        self._num_requests = 0

    def require_run(self, num_ranks: int, num_heads: int | None, max_staleness: int) -> None:
        """See ``SelectiveEngine``; vLLM must be installed."""
        if find_spec("vllm") is None:
            raise UserError(
                "data.engine VLLMEngine needs vLLM, which is not installed: "
                'pip install "egspo-lightning[vllm]" on a machine with a GPU, or leave data.engine out.'
            )
        require_group(self.tensor_parallel_size, num_ranks, num_heads, max_staleness)

    def stream(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> Iterator[list[tuple[int, Sample]]]:
        """See ``RolloutEngine``; with ``top_p`` below 1, log-probabilities are renormalized over the nucleus.

        Raises:
            UserError: a request is too long, the temperature too low, or vLLM cannot run the model.
            RuntimeError: the ranks of a tensor parallel group sampled different tokens.
        """
        require_temperature(sampling, "VLLMEngine")
        vllm = self._started(lm)
        stream = partial(self._stream, vllm, lm, sampling, eos_ids)
        # A thread that samples ahead may be left behind at the end of the run, when other ranks have ended.
        is_main = threading.current_thread() is threading.main_thread()
        with watched(self._processes) if is_main else nullcontext():
            if self.tensor_parallel_size == 1:
                yield from stream(requests)
            else:
                yield from stream_together(requests, stream, vllm.group, lambda: self.running is vllm)

    def _stream(
        self, vllm: Running, lm: Any, sampling: Sampling, eos_ids: Sequence[int], requests: Sequence[Request]
    ) -> Iterator[list[tuple[int, Sample]]]:
        """Copy the weights, and sample requests with this rank's engine."""
        device = compute_device(lm)
        require_room("VLLMEngine.max_model_len", vllm.engine.model_config.max_model_len, requests, sampling)
        with apart(device):
            self._renew(vllm, lm, device)
            numbers = self._add(vllm, requests, sampling, eos_ids)
        try:
            while numbers:
                with apart(device):
                    done = [output for output in vllm.engine.step() if output.finished]
                if done:
                    yield [(numbers.pop(output.request_id), _sample(output.outputs[0], eos_ids)) for output in done]
        finally:
            is_open = self.running is vllm  # an error of the run closes the engine before this generator
            if numbers and is_open:
                vllm.engine.abort_request(list(numbers))
            if is_open and self._sleeps(device):
                vllm.llm.sleep(level=2)  # discards the weights, which the next call copies again

    def close(self) -> None:
        """Shut vLLM down and free its memory; the next call of ``stream`` starts it again."""
        if self.running is not None:
            self.running.close()
            self.running = None

    def start(self, lm: Any) -> None:
        """Start vLLM, unless it runs. Collective.

        Raises:
            UserError: vLLM is not installed, or cannot run the model, or not on these ranks.
            RuntimeError: vLLM runs for a model of another config.
        """
        config, device = lm.config.to_json_string(use_diff=False), compute_device(lm)
        if self.running is None:
            self.require_run(num_ranks(), None, 0)
            settings = {
                "max_model_len": self.max_model_len,
                "max_num_seqs": self.max_num_seqs,
                "gpu_memory_utilization": self.gpu_memory_utilization,
                "kv_cache_memory_bytes": None if self.kv_cache_gib is None else int(self.kv_cache_gib * 2**30),
                "dtype": self.dtype or str(compute_dtype(lm)).removeprefix("torch."),
                "enable_sleep_mode": self._sleeps(device),
                "enforce_eager": self.enforce_eager,
                "tensor_parallel_size": self.tensor_parallel_size,
            }
            self.running, self._config = start_vllm(lm, device, settings), config
            self._processes = processes_here() if num_ranks() > 1 else []
            if self._sleeps(device):
                self.running.llm.sleep(level=2)
        if config != self._config:
            raise RuntimeError(
                "VLLMEngine was started for a model of another config: close it, or make another engine."
            )

    def reservation(self, num_parameters: int, dtype: torch.dtype, device_bytes: int) -> Reservation:
        """See ``ReservingEngine``. vLLM's own activations, and CUDA graphs, come out of the cache."""
        itemsize = (dtype if self.dtype is None else getattr(torch, self.dtype)).itemsize
        weights = num_parameters * itemsize // self.tensor_parallel_size
        share = int(self.gpu_memory_utilization * device_bytes)
        cache = max(share - weights, 0) if self.kv_cache_gib is None else int(self.kv_cache_gib * 2**30)
        return Reservation(weights, cache, self.tensor_parallel_size, itemsize, stays=not self.enable_sleep)

    def _started(self, lm: Any) -> Running:
        """The vLLM instance, which is started by the first call where the run has not done it."""
        self.start(lm)
        assert self.running is not None
        if self.running.engine.has_unfinished_requests():
            raise RuntimeError("VLLMEngine is asked for samples while it streams others, whose weights would change.")
        return self.running

    def _sleeps(self, device: torch.device) -> bool:
        return self.enable_sleep and device.type == "cuda"

    def _renew(self, vllm: Running, lm: Any, device: torch.device) -> None:
        """Copy the policy's current weights into vLLM, and reset its prefix cache."""
        asleep = self._sleeps(device)
        if asleep:
            vllm.llm.wake_up(tags=["weights"])
        self.copy_weights(vllm, lm)
        if asleep:
            vllm.llm.wake_up(tags=["kv_cache"])
        self._forget_prefixes(vllm)

    @torch.no_grad()
    def copy_weights(self, vllm: Running, lm: Any) -> None:
        """Copy all weights of the policy into vLLM, one at a time. Collective.

        Raises:
            UserError: the policy has no values for some of vLLM's weights.
        """
        taken = vllm.model.load_weights(whole_weights(lm))
        stale = {name for name, _ in vllm.model.named_parameters()} - (taken or set())
        if stale:
            raise UserError(
                f"data.engine VLLMEngine: vLLM takes none of {type(lm).__name__}'s weights for {min(stale)} (of "
                f"{len(stale)}), and would sample from random ones. Use the default engine with this model."
            )

    def _forget_prefixes(self, vllm: Running) -> None:
        """Drop cached keys and values, which belong to other weights."""
        if not vllm.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache, and would sample from stale keys and values.")

    def _add(
        self, vllm: Running, requests: Sequence[Request], sampling: Sampling, eos_ids: Sequence[int]
    ) -> dict[str, int]:
        """Queue the requests; returns their numbers by vLLM's request id."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        numbers: dict[str, int] = {}
        for number, request in enumerate(requests):
            name, self._num_requests = f"egspo-{self._num_requests}", self._num_requests + 1
            settings = SamplingParams(
                **sampling_settings(request, sampling, eos_ids), output_kind=RequestOutputKind.FINAL_ONLY
            )
            prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
            vllm.engine.add_request(name, prompt, settings)
            numbers[name] = number
        return numbers


def _sample(output: Any, eos_ids: Sequence[int]) -> Sample:
    tokens = list(output.token_ids)
    logprobs = [by_token[token].logprob for token, by_token in zip(tokens, output.logprobs, strict=True)]
    return Sample(tokens, tokens[-1] not in eos_ids, logprobs)
