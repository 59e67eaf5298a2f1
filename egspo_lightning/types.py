"""The records that flow through the project, and the legend of their shapes.

Shapes: B sequences, T tokens, V vocabulary entries, G rollouts a prompt, D hidden size.

A sequence is ``prompt + completion``, padded on the right. All (B, T) tensors are aligned to ``input_ids``: entry
``[b, t]`` speaks of the token at position t (its log-probability is predicted from position t - 1, its value is that
of the state before it). ``completion_mask`` is true on the completion and its EOS, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from egspo_lightning.errors import require

if TYPE_CHECKING:  # the grader's workers import this package without torch
    from torch import Tensor

    PositiveInt = int  # a chain of assignments would be no type alias to a type checker
    NonNegativeInt = int
    Count = int
    PositiveFloat = float
    NonNegativeFloat = float
    AboveOne = float
    AtLeastOne = float
    UnitInterval = float
    PositiveShare = float
    ShareBelowOne = float
else:
    from jsonargparse.typing import ClosedUnitInterval as UnitInterval  # noqa: F401  for configs to import from here
    from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type  # noqa: F401

    Count = restricted_number_type("Count", int, [(">=", 1), ("<=", 10**8)])
    """What is counted in memory: the upper limit is far above what fits and below what hangs before it fails."""
    PositiveFloat = restricted_number_type("FinitePositiveFloat", float, [(">", 0), ("<", float("inf"))])
    NonNegativeFloat = restricted_number_type("FiniteNonNegativeFloat", float, [(">=", 0), ("<", float("inf"))])
    PositiveShare = restricted_number_type("PositiveShare", float, [(">", 0), ("<=", 1)])
    """A share in (0, 1]."""
    ShareBelowOne = restricted_number_type("ShareBelowOne", float, [(">=", 0), ("<", 1)])
    """A share in [0, 1)."""
    AboveOne = restricted_number_type("AboveOne", float, [(">", 1)])
    AtLeastOne = restricted_number_type("AtLeastOne", float, [(">=", 1), ("<", float("inf"))])
"""Ranges of config values, which the command line's parser enforces; a parsed value is an instance of a subclass of int
or float, so convert it with int() or float() before it goes into a checkpoint, which holds plain values alone."""


Measurements = Mapping[str, tuple[float, float]]
"""Metric name to (sum, count) on this rank; the metric is their ratio over all ranks, or the sum where count is 0."""


class Stage(StrEnum):
    """What the next Lightning epoch trains."""

    SFT = "sft"
    EGSPO = "egspo"


class Problem(NamedTuple):
    """A question with its reference answer, as written by the source ("\\frac{1}{2}", "72")."""

    id: str
    problem: str
    answer: str
    """Empty where it is not known: such a problem can be answered, not graded or trained on."""
    subject: str = ""
    level: str = ""


class Demonstration(NamedTuple):
    """A question with an expert's solution that ends in ``\\boxed{answer}``."""

    id: str
    problem: str
    solution: str


class ExpertSolution(NamedTuple):
    """A demonstration as a problem with the tokens of its solution."""

    problem: Problem
    token_ids: list[int]
    """With the EOS."""


@dataclass(frozen=True)
class Sampling:
    """How to sample completions.

    Args:
        max_completion_length: Length limit in tokens, EOS included.
        temperature: Logits are divided by it; 0 is greedy.
        top_p: Keep the fewest tokens whose probabilities reach it. For evaluation only: training needs the
            log-probabilities of the distribution that was sampled.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(self.max_completion_length >= 1, "max_completion_length", self.max_completion_length, "at least 1")
        require(self.temperature >= 0, "temperature", self.temperature, "at least 0 (0 is greedy)")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")


class ProblemBatch(NamedTuple):
    """Problems to answer in evaluation, and how."""

    benchmark: str
    problems: list[Problem]
    num_samples: int
    sampling: Sampling


class Completion(NamedTuple):
    """One sampled answer to a problem, with its verdict."""

    problem: Problem
    token_ids: list[int]
    """The sampled tokens, with the EOS where one was sampled."""
    logprobs: list[float]
    """Their log-probabilities as the engine saw them, nats."""
    text: str
    """The decoded tokens, without special tokens."""
    is_truncated: bool
    """The length limit was reached before an EOS."""
    reward: float
    correct: bool
    extracted: str | None
    """The answer that was found in the text."""
    status: str
    """How the grader got to its verdict: graded, no_answer, timeout or crashed."""
    reward_terms: Mapping[str, float] = {}
    """What the reward is a weighted sum of, by name, before weights."""
    entropies: list[float] | None = None
    """Entropies of the distributions that the tokens were sampled from, nats; None where the engine told none."""


class UpdateSize(NamedTuple):
    """The size of one optimizer step, over all its micro-batches and ranks: what its losses are divided by."""

    num_tokens: float
    """completion tokens"""
    num_sequences: float
    """sequences that have a completion token"""
    max_length: float
    """the length limit of a completion, in tokens"""
    num_active_tokens: float
    """completion tokens of the sequences that take part: rollouts of advantage 0 may be left out"""
    num_sampled_tokens: float
    """those of them that the policy sampled itself"""


class ExpertBatch(NamedTuple):
    """A micro-batch of expert demonstrations."""

    input_ids: Tensor
    """(B, T) int64"""
    completion_mask: Tensor
    """(B, T) bool"""
    update_size: UpdateSize


class NetworkOutputs(NamedTuple):
    """What the networks in training say of the completion tokens, with gradient; all (B, T), 0 elsewhere."""

    logprobs: Tensor
    """nats"""
    entropies: Tensor
    """nats"""
    values: Tensor | None = None
    """of the critic, where there is one; in units of the return"""


class Scores(NamedTuple):
    """What the networks say of given sequences, without gradient; all (B, T) float32."""

    logprobs: Tensor
    entropies: Tensor
    ref_logprobs: Tensor | None = None
    """of the reference policy, where there is one"""
    values: Tensor | None = None
    """of the critic, where there is one"""


class ScoredRollouts(NamedTuple):
    """The completions of one rank's collection, graded and scored: first G of each problem, then those of experts."""

    input_ids: Tensor
    """(B, T) int64"""
    completion_mask: Tensor
    """(B, T) bool"""
    scores: Scores
    rewards: Tensor
    """(B,) float32"""
    is_truncated: Tensor
    """(B,) bool: the length limit was reached before an EOS"""
    group_size: int
    """G"""
    expert_groups: Tensor
    """(E,) int64: the last E rows are experts' solutions, each beside the group of this number"""
    max_length: int
    """the length limit of a completion, in tokens"""
    policy_version: int
    """the optimizer steps that the sampling policy had taken"""
    sampled_logprobs: Tensor | None = None
    """(B, T) float32, nats: as the engine told them, NaN where it did not; None where they are the scores' own"""

    @property
    def num_sampled(self) -> int:
        """Rows that the policy sampled: P * G."""
        return self.input_ids.shape[0] - self.expert_groups.shape[0]


class RolloutBatch(NamedTuple):
    """Rollouts with all that an update needs of them; a whole collection of one rank, or a micro-batch of it."""

    input_ids: Tensor
    """(B, T) int64"""
    completion_mask: Tensor
    """(B, T) bool"""
    old_logprobs: Tensor
    """(B, T) float32: log-probability, in nats, under the policy that sampled, at the sampling temperature"""
    entropies: Tensor
    """(B, T) float32: entropy, in nats, of the distribution that each token was sampled from"""
    ref_logprobs: Tensor | None
    """(B, T) float32 under the reference policy; None where the loss has no KL to it"""
    old_values: Tensor | None
    """(B, T) float32 of the critic at the time of sampling; None without one"""
    advantages: Tensor
    """(B, T) float32"""
    returns: Tensor | None
    """(B, T) float32: what the critic is to learn; None without one"""
    rewards: Tensor
    """(B,) float32"""
    is_expert: Tensor
    """(B,) bool: an expert's solution, which the policy did not sample"""
    threshold: Tensor
    """(B, 1) float32, nats: entropy from which a token counts as high"""
    weight_scale: Tensor
    """(B, 1) float32: what the gate's weights are multiplied by, the same everywhere"""
    policy_version: int
    """the optimizer steps that the sampling policy had taken"""
    update_size: UpdateSize
    sampled_logprobs: Tensor | None = None
    """(B, T) float32, nats: as the engine told them, NaN where it did not; None where they are the old ones"""

    @property
    def sampled_mask(self) -> Tensor:
        """(B, T) bool: the tokens that the policy sampled itself."""
        return self.completion_mask & ~self.is_expert.unsqueeze(1)


class TrainingBatch(NamedTuple):
    """What ``training_step`` is given: expert data in stage SFT, rollouts and (where mu > 0) expert data in EGSPO."""

    stage: Stage
    rollout: RolloutBatch | None
    expert: ExpertBatch | None
