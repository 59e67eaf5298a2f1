"""What the rest of the project asks of something that samples, whether transformers or vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from egspo_lightning.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Args:
        max_completion_length: Length limit in tokens, EOS included.
        temperature: Logits are divided by it; 0 is greedy.
        top_p: Keep the fewest tokens whose probabilities sum to it. For evaluation only: log-probabilities would not
            be those of the distribution that was sampled.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise UserError(f"max_completion_length must be at least 1, got {self.max_completion_length}.")
        if self.temperature < 0:
            raise UserError(f"temperature must be at least 0 (0 is greedy), got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}.")


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


class RolloutEngine(Protocol):
    """Samples completions from the policy as it is now."""

    def generate(
        self, lm: Any, requests: Sequence[Request], sampling: Sampling, *, eos_ids: Sequence[int], pad_id: int
    ) -> list[Sample]:
        """One sample a request, in their order.

        Args:
            lm: the causal language model, in eval mode, within the policy's sampling context
            requests: prompts; equal ones next to one another share their prefill
            sampling: how to sample
            eos_ids: tokens that end a completion
            pad_id: fills the rows of shorter prompts
        """
        ...
