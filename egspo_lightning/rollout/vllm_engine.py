"""Sampling with vLLM in the trainer's own process, from the trainer's weights.

Each call of ``stream`` copies the policy's weights into vLLM and forgets cached prefixes before it samples, whatever
has moved the policy: an optimizer step, a checkpoint, a new stage, adapters, another object. There is no counter that
could miss one; a copy takes milliseconds where sampling takes seconds. Adapters are merged on the way.

Run with vLLM 0.32 on one CPU process, in float32. Not run: CUDA, and therefore ``enable_sleep``, bfloat16, and
``gpu_memory_utilization``.
"""

import hashlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from egspo_lightning.errors import UserError, require
from egspo_lightning.models import lora
from egspo_lightning.rollout.engine import Request, RolloutEngine, Sample
from egspo_lightning.rollout.vllm_process import Running, apart, start_vllm
from egspo_lightning.types import Sampling

LEAST_TEMPERATURE = 0.01
"""vLLM raises lower ones to it, and takes those below 1e-5 for greedy."""


class VLLMEngine(RolloutEngine):
    """Samples with vLLM; needs ``pip install "egspo-lightning[vllm]"`` and one process.

    A sample depends on its seed and prompt alone, up to rounding, which differs with what is sampled beside it. Of
    entropies it tells nothing, so rollouts are scored by the policy, and ``rollout/sampler_gap`` says how far the two
    are apart.

    Args:
        gpu_memory_utilization: Share of a GPU's memory that weights and cache of vLLM may take, in (0, 1]; training
            takes the rest.
        kv_cache_gib: Memory for the cache instead, in GiB; on a CPU 1 by default.
        max_model_len: Longest prompt with its completion, in tokens; by default the most that the model was made for,
            which a small cache may not hold.
        max_num_seqs: Completions decoded at a time.
        dtype: Type of vLLM's weights; by default what training computes in.
        enable_sleep: On a GPU, give the memory back between calls.
        enforce_eager: On a GPU, do without CUDA graphs: slower, and less memory.
        tensor_parallel_size: GPUs that share a model; more than 1 is not supported yet.
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.3,
        kv_cache_gib: float | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        enable_sleep: bool = True,
        enforce_eager: bool = False,
        tensor_parallel_size: int = 1,
    ) -> None:
        share, room = gpu_memory_utilization, kv_cache_gib
        require(0 < share <= 1, "VLLMEngine.gpu_memory_utilization", share, "in (0, 1]")
        require(room is None or 0 < room < inf, "VLLMEngine.kv_cache_gib", room, "above 0, or null")
        require(max_model_len is None or max_model_len >= 2, "VLLMEngine.max_model_len", max_model_len, "at least 2")
        require(max_num_seqs >= 1, "VLLMEngine.max_num_seqs", max_num_seqs, "at least 1")
        allowed = (
            "1: each rank samples its own problems with a whole model. For a model that does not fit on a GPU beside "
            "its training, use --trainer.strategy fsdp2 with the default engine"
        )
        require(tensor_parallel_size == 1, "VLLMEngine.tensor_parallel_size", tensor_parallel_size, allowed)
        if find_spec("vllm") is None:
            raise UserError(
                "data.engine VLLMEngine needs vLLM, which is not installed: "
                'pip install "egspo-lightning[vllm]" on a machine with a GPU, or leave data.engine out.'
            )
        self.gpu_memory_utilization, self.kv_cache_gib = gpu_memory_utilization, kv_cache_gib
        self.max_model_len, self.max_num_seqs, self.dtype = max_model_len, max_num_seqs, dtype
        self.enable_sleep, self.enforce_eager = enable_sleep, enforce_eager
        self.running: Running | None = None
        """vLLM, once it has started."""
        self._config = ""
        self._num_requests = 0

    def stream(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> Iterator[list[tuple[int, Sample]]]:
        """See ``RolloutEngine``; where ``top_p`` is below 1, log-probabilities are those of what it leaves.

        Raises:
            UserError: a request is too long, the temperature too low, or vLLM cannot run the model.
        """
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            allowed = f"0, or at least {LEAST_TEMPERATURE} with VLLMEngine"
            require(False, "temperature", sampling.temperature, allowed)
        device = next(lm.parameters()).device
        vllm = self._started(lm, device)
        self._require_room(vllm, requests, sampling)
        with apart(device):
            self._renew(vllm, lm)
            numbers = self._add(vllm, requests, sampling, eos_ids)
        try:
            while numbers:
                with apart(device):
                    done = [output for output in vllm.engine.step() if output.finished]
                if done:
                    yield [(numbers.pop(output.request_id), _sample(output.outputs[0], eos_ids)) for output in done]
        finally:
            if numbers:
                vllm.engine.abort_request(list(numbers))
            if self._sleeps(device):
                vllm.llm.sleep(level=2)  # weights are discarded: they come anew with the next call

    def close(self) -> None:
        """End vLLM and free its memory; it starts again when it is asked for samples."""
        if self.running is not None and self.running.close():
            self.running = None

    def _started(self, lm: Any, device: torch.device) -> Running:
        """vLLM, started at the first call."""
        config = lm.config.to_json_string(use_diff=False)
        if self.running is None:
            settings = {
                "max_model_len": self.max_model_len,
                "max_num_seqs": self.max_num_seqs,
                "gpu_memory_utilization": self.gpu_memory_utilization,
                "kv_cache_memory_bytes": None if self.kv_cache_gib is None else int(self.kv_cache_gib * 2**30),
                "dtype": self.dtype or str(_computed_in(lm, device)).removeprefix("torch."),
                "enable_sleep_mode": self._sleeps(device),
                "enforce_eager": self.enforce_eager,
            }
            self.running, self._config = start_vllm(lm, device, settings), config
        if config != self._config:
            raise RuntimeError(
                "VLLMEngine was started for a model of another config: close it, or make another engine."
            )
        if self.running.engine.has_unfinished_requests():
            raise RuntimeError("VLLMEngine is asked for samples while it streams others, whose weights would change.")
        return self.running

    def _sleeps(self, device: torch.device) -> bool:
        return self.enable_sleep and device.type == "cuda"

    def _require_room(self, vllm: Running, requests: Sequence[Request], sampling: Sampling) -> None:
        """vLLM would cut completions off that do not fit."""
        limit = vllm.engine.model_config.max_model_len
        needed = max(len(request.prompt_ids) for request in requests) + sampling.max_completion_length
        allowed = f"at least {needed}, the longest prompt with max_completion_length = {sampling.max_completion_length}"
        require(needed <= limit, "VLLMEngine.max_model_len", limit, allowed)

    def _renew(self, vllm: Running, lm: Any) -> None:
        """Sample from the policy as it is now."""
        asleep = self._sleeps(next(lm.parameters()).device)
        if asleep:
            vllm.llm.wake_up(tags=["weights"])
        self.copy_weights(vllm, lm)
        if asleep:
            vllm.llm.wake_up(tags=["kv_cache"])
        self._forget_prefixes(vllm)

    @torch.no_grad()
    def copy_weights(self, vllm: Running, lm: Any) -> None:
        """Give vLLM all weights of the policy.

        Raises:
            UserError: some of vLLM's have none there.
        """
        weights: dict[str, Tensor] = {name: parameter.detach() for name, parameter in lm.named_parameters()}
        taken = vllm.model.load_weights(lora.merged(lm, weights).items())
        stale = {name for name, _ in vllm.model.named_parameters()} - (taken or set())
        if stale:
            raise UserError(
                f"data.engine VLLMEngine: vLLM takes none of {type(lm).__name__}'s weights for {min(stale)} (of "
                f"{len(stale)}), and would sample from random ones. Use the default engine with this model."
            )

    def _forget_prefixes(self, vllm: Running) -> None:
        """Keys and values that were cached are those of other weights."""
        if not vllm.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache, and would sample from stale keys and values.")

    def _add(
        self, vllm: Running, requests: Sequence[Request], sampling: Sampling, eos_ids: Sequence[int]
    ) -> dict[str, int]:
        """Queue the requests; their numbers by vLLM's names for them."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        numbers: dict[str, int] = {}
        for number, request in enumerate(requests):
            name, self._num_requests = f"egspo-{self._num_requests}", self._num_requests + 1
            settings = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=-1,
                seed=stable_seed(request.seed),
                max_tokens=sampling.max_completion_length,
                stop_token_ids=list(eos_ids),
                ignore_eos=True,  # that of the model's config, which may be another
                logprobs=0,  # of the sampled token alone
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
            vllm.engine.add_request(name, prompt, settings)
            numbers[name] = number
        return numbers


def stable_seed(name: str) -> int:
    """A random stream's name as a number of 63 bits, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def _computed_in(lm: Any, device: torch.device) -> torch.dtype:
    """The type that the policy's products are computed in."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtype: torch.dtype = next(lm.parameters()).dtype
    return dtype


def _sample(output: Any, eos_ids: Sequence[int]) -> Sample:
    tokens = list(output.token_ids)
    logprobs = [told[token].logprob for token, told in zip(tokens, output.logprobs, strict=True)]
    return Sample(tokens, tokens[-1] not in eos_ids, logprobs)
