"""Requests to vLLM: sampling settings, seeds and limits, for each engine that samples with it."""

import hashlib
from collections.abc import Sequence
from typing import Any

from egspo_lightning.errors import require
from egspo_lightning.rollout.engine import Request
from egspo_lightning.types import Sampling

LEAST_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one, and samples greedily below 1e-5."""


def sampling_settings(request: Request, sampling: Sampling, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Arguments of ``vllm.SamplingParams`` for one request."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "seed": stable_seed(request.seed),
        "max_tokens": sampling.max_completion_length,
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,  # the EOS of the model's config may be another one
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }


def require_temperature(sampling: Sampling, engine: str) -> None:
    """Refuse a temperature that vLLM would raise.

    Raises:
        UserError: the temperature is too low; ``engine`` is named.
    """
    allowed = f"0, or at least {LEAST_TEMPERATURE} with {engine}"
    require(not 0 < sampling.temperature < LEAST_TEMPERATURE, "temperature", sampling.temperature, allowed)


def require_room(field: str, limit: int, requests: Sequence[Request], sampling: Sampling) -> None:
    """Refuse requests that do not fit: vLLM would cut off their completions.

    Raises:
        UserError: a prompt with its completion is longer than ``limit`` tokens, the value of ``field``.
    """
    needed = max((len(request.prompt_ids) for request in requests), default=0) + sampling.max_completion_length
    allowed = f"at least {needed}, the longest prompt with max_completion_length = {sampling.max_completion_length}"
    require(needed <= limit, field, limit, allowed)


def stable_seed(name: str) -> int:
    """Hash a random stream's name to a number of 63 bits, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
