"""What the rest of the project asks of something that samples, whether transformers or vLLM."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from egspo_lightning.types import Sampling


class Request(NamedTuple):
    """One completion to sample."""

    prompt_ids: Sequence[int]
    seed: str
    """Names the random stream of this completion, so that it does not depend on what it is sampled with."""


class Sample(NamedTuple):
    """One sampled completion."""

    token_ids: list[int]
    """With the EOS where one was sampled."""
    is_truncated: bool
    """The length limit came before an EOS."""
    logprobs: list[float]
    """Log-probability of each token under the distribution that it was sampled from, as the engine saw it, nats."""
    entropies: list[float] | None = None
    """Entropy of that distribution at each token, nats; None where an engine does not tell it."""


class RolloutEngine(Protocol):
    """Samples completions from the policy as it is now.

    With data.max_staleness ``stream`` is called in a thread, with a copy of the model. An engine that bears to be
    called meanwhile from another one, with another model, says so by an attribute ``is_reentrant`` that is true;
    benchmarks wait for the others.
    """

    def stream(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> Iterator[list[tuple[int, Sample]]]:
        """One sample a request, each with the number of its request, as they are done: in batches, in any order.

        A group of completions is graded, once it is whole, while others are sampled.

        Args:
            lm: the causal language model, in eval mode, within the policy's sampling context
            requests: prompts; equal ones next to one another share their prefill
            sampling: how to sample
            eos_ids: tokens that end a completion
            pad_id: fills the rows of shorter prompts
        """
        ...


@runtime_checkable
class ClosingEngine(Protocol):
    """An engine that holds something which should end with the run."""

    def close(self) -> None:
        """Let go of it; an engine that is asked for samples again starts again."""
        ...
