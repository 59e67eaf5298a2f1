"""Rollout engine interface, for transformers, vLLM or a user's own engine, and sampling of completions with it."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from egspo_lightning.rollout.policy_protocol import RolloutPolicy
from egspo_lightning.rollout.rollout_records import Prompt
from egspo_lightning.types import Sampling


class Request(NamedTuple):
    """One completion to sample."""

    prompt_ids: Sequence[int]
    seed: str
    """Name of this completion's random stream; its sample does not depend on the other requests."""


class Sample(NamedTuple):
    """One sampled completion."""

    token_ids: list[int]
    """With the EOS where one was sampled."""
    is_truncated: bool
    """The length limit came before an EOS."""
    logprobs: list[float]
    """Log-probability of each token under the distribution that it was sampled from, as the engine saw it, nats."""
    entropies: list[float] | None = None
    """Entropy of that distribution at each token, nats; None where the engine does not report it."""


class RolloutEngine(Protocol):
    """Samples completions from the current policy.

    With data.max_staleness a thread calls ``stream``, with a copy of the model. An engine that may then also be called
    from another thread, with another model, has an attribute ``is_reentrant`` that is true. Benchmarks wait for others.

    An engine that samples from a copy of the weights has an attribute ``takes_shards`` that is true. It gets a sharded
    model in shards, and all ranks call it together, also those without requests.
    """

    @abstractmethod
    def stream(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> Iterator[list[tuple[int, Sample]]]:
        """Yield batches of (request number, sample) as samples end, in any order; one sample for each request.

        Complete groups are graded while other completions are still sampled.

        Args:
            lm: the causal language model, in eval mode, within the policy's sampling context
            requests: prompts; adjacent requests with equal prompts share their prefill
            sampling: how to sample
            eos_ids: tokens that end a completion
            pad_id: token that pads shorter prompts
        """


@runtime_checkable
class SelectiveEngine(Protocol):
    """An engine that does not fit every run."""

    def require_run(self, num_ranks: int, num_heads: int | None, max_staleness: int) -> None:
        """Refuse a run at its start.

        Args:
            num_ranks: number of ranks
            num_heads: number of attention heads of the model; None where its config does not say
            max_staleness: data.max_staleness in training, else 0

        Raises:
            UserError: naming the settings that do not fit the engine, and a remedy.
        """


@runtime_checkable
class StartingEngine(Protocol):
    """An engine that the ranks start together, in their main threads, before the first call of ``stream``."""

    def start(self, lm: Any) -> None:
        """Start the engine for a model within the policy's sampling context, unless it runs. Collective."""


class Reservation(NamedTuple):
    """Memory on one device of an engine with weights and a cache of its own, bytes."""

    weights: int
    """the engine's copy of the weights"""
    cache: int
    """room for keys and values"""
    num_devices: int
    """number of devices that share a copy, and the heads of keys and values"""
    itemsize: int
    """bytes of a number in weights and cache"""
    stays: bool
    """Whether the engine holds both while it does not sample."""


@runtime_checkable
class ReservingEngine(Protocol):
    """An engine that samples with weights and a cache of its own."""

    def reservation(self, num_parameters: int, dtype: torch.dtype, device_bytes: int) -> Reservation:
        """The memory that it takes on a device of that size, for a policy that computes in ``dtype``."""


@runtime_checkable
class ClosingEngine(Protocol):
    """An engine that holds resources until the end of the run."""

    def close(self) -> None:
        """Release the resources; the next call of ``stream`` starts the engine again."""


def sample(
    policy: RolloutPolicy, engine: RolloutEngine, prompts: Sequence[Prompt], num_samples: int, sampling: Sampling
) -> list[Sample]:
    """Sample ``num_samples`` completions of each prompt; those of a prompt are adjacent. Collective.

    Statistics, which take 64 bytes a token, are left out. All ranks must call it equally often, even without prompts.
    """
    batches = stream_samples(policy, engine, prompts, num_samples, sampling)
    done = {i: found._replace(logprobs=[], entropies=None) for batch in batches for i, found in batch}
    return [done[i] for i in range(len(prompts) * num_samples)]


def stream_samples(
    policy: RolloutPolicy, engine: RolloutEngine, prompts: Sequence[Prompt], num_samples: int, sampling: Sampling
) -> Iterator[list[tuple[int, Sample]]]:
    """Yield batches of (request number, sample) within the policy's sampling context."""
    requests = [Request(prompt.token_ids, f"{prompt.seed}/{i}") for prompt in prompts for i in range(num_samples)]
    takes_shards = getattr(engine, "takes_shards", False)
    with policy.sampling(whole=not takes_shards) as lm:
        if requests or takes_shards:
            pad_id = policy.tokenizer.pad_token_id
            yield from engine.stream(lm, requests, sampling, eos_ids=policy.eos_ids, pad_id=pad_id)
