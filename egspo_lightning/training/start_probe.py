"""Start probe: samples, scores and passes two short prompts before training, and compares the log-probabilities.

A model whose cache or forward pass the engine, the scorer or the packed passes cannot use is so refused within seconds.
Otherwise the first rollout batch, after the whole of SFT, would show it. The probe changes neither weights nor random
states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from egspo_lightning.checkpointing.random_state import random_state, restore_random_state
from egspo_lightning.errors import PASS_ERRORS, UserError
from egspo_lightning.ops.batching import pad_right
from egspo_lightning.rollout.engine import Request, RolloutEngine, Sample
from egspo_lightning.rollout.policy_protocol import TrainedPolicy
from egspo_lightning.rollout.transformers_engine import TransformersEngine, suits_decode_loop
from egspo_lightning.training.rollout_checks import LOW_PRECISION_TOLERANCE
from egspo_lightning.types import Sampling

PROMPT_LENGTHS, COMPLETION_LENGTH = (4, 11), 6
"""In tokens, where the run's limits are not lower."""
TOLERANCE = 3e-4
"""Largest mean distance in float32, nats a token. It is below ``FULL_PRECISION_TOLERANCE``, as training adds to it."""


def probe_policy(
    policy: TrainedPolicy, engine: RolloutEngine, *, max_prompt_length: int, max_completion_length: int
) -> None:
    """Refuse a policy whose sampled, scored and trained log-probabilities differ by more than rounding. Collective.

    Only ``TransformersEngine`` is sampled with. vLLM would have to be started first, and an engine of the user's own
    may keep state. The first rollout batch checks those, and the probe has fixed tokens for completions.

    Raises:
        UserError: naming the model type, what failed or differed, and remedies.
    """
    requests = _requests(policy.tokenizer, max_prompt_length)
    length = min(COMPLETION_LENGTH, max_completion_length)
    state = random_state()
    try:
        with policy.scoring() as lm:
            samples = _sample(policy, engine, lm, requests, length) if type(engine) is TransformersEngine else None
            _compare(policy, lm, requests, samples, length)
    finally:
        restore_random_state(state)


def _compare(
    policy: TrainedPolicy, lm: Any, requests: list[Request], samples: list[Sample] | None, length: int
) -> None:
    """Compare the engine with the scorer, and the scorer with the passes of an optimizer step."""
    fixed = [list(request.prompt_ids[:1]) * length for request in requests]
    completions = fixed if samples is None else [sample.token_ids for sample in samples]
    pairs = [(request.prompt_ids, tokens) for request, tokens in zip(requests, completions, strict=True)]
    ids, mask = (tensor.to(policy.device) for tensor in pad_right(pairs, policy.tokenizer.pad_token_id))
    with _explaining_failure(lm, "scoring"):
        scored = policy.score(ids, mask).logprobs[mask]
    if samples is not None:
        sampled = torch.tensor([sample.logprobs for sample in samples], device=policy.device).flatten()
        is_exact = policy.is_full_precision and torch.get_float32_matmul_precision() == "highest"
        _require_equal(lm, "the engine", sampled, scored, is_exact)
    with _explaining_failure(lm, "the training pass"):
        trained = policy.trained_logprobs(ids, mask)[mask]
    _require_equal(lm, "the training pass", trained, scored, policy.is_full_precision)


def _requests(tokenizer: Any, max_prompt_length: int) -> list[Request]:
    """Two completions of each of two prompts, which have different lengths where the limit allows."""
    special = set(tokenizer.all_special_ids)
    ids = list(islice((i for i in range(len(tokenizer)) if i not in special), max(PROMPT_LENGTHS)))
    return [Request(ids[: min(n, max_prompt_length)], f"{n}/{i}") for n in PROMPT_LENGTHS for i in range(2)]


def _sample(
    policy: TrainedPolicy, engine: RolloutEngine, lm: Any, requests: list[Request], length: int
) -> list[Sample]:
    """Completions of ``length`` tokens: nothing ends them earlier."""
    if not suits_decode_loop(lm):
        rank_zero_info(
            f"Models of type {lm.config.model_type!r} are sampled by transformers' generate, prompts of one length at "
            "a time. It is slower than the decode loop for caches of keys and values."
        )
    sampling, pad_id = Sampling(length, policy.temperature), policy.tokenizer.pad_token_id
    with _explaining_failure(lm, "sampling"):
        batches = engine.stream(lm, requests, sampling, eos_ids=[], pad_id=pad_id)
        return [sample for _, sample in sorted(pair for batch in batches for pair in batch)]


def _require_equal(lm: Any, name: str, found: Tensor, scored: Tensor, is_exact: bool) -> None:
    """Compare two passes; in float32 a model with small random weights, whose tokens differ less, is judged closer."""
    distance = (found - scored).abs().mean().item()
    spread = scored.std().clamp(0.1, 1.0).item()
    tolerance = TOLERANCE * spread if is_exact else LOW_PRECISION_TOLERANCE
    if distance > tolerance:  # NaN passes: such steps are skipped and counted
        _refuse(
            lm,
            f"{name} gives log-probabilities that are {distance:.2g} nats a token from those of the scoring pass, "
            f"where at most {tolerance:.2g} is expected",
        )


@contextmanager
def _explaining_failure(lm: Any, name: str) -> Iterator[None]:
    """Name the model where its own code fails."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except PASS_ERRORS as error:
        _refuse(lm, f"{name} failed with {type(error).__name__}: {' '.join(str(error).split())}", error)


def _refuse(lm: Any, finding: str, cause: Exception | None = None) -> None:
    raise UserError(
        f"model.policy.name_or_path: models of type {lm.config.model_type!r} ({type(lm).__name__}) cannot be trained "
        f"here. A probe with two prompts before training found that {finding}. Choose another model, another "
        f"model.policy.attn_implementation (now {lm.config._attn_implementation}), or another data.engine."
    ) from cause
