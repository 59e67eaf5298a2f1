"""Shared records, the legend of their tensor shapes, and restricted number types for configs.

Shapes: B sequences, T tokens, V vocabulary entries, G rollouts per prompt, D hidden size.

A sequence is ``prompt + completion``, padded on the right. All (B, T) tensors are aligned to ``input_ids``: entry
``[b, t]`` belongs to the token at position t. Position t - 1 predicts its log-probability; its value is the value of
the state before it. ``completion_mask`` is true on the completion and its EOS, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

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
    """Upper limit for any count: more would exhaust memory, or hang before it fails."""
    PositiveFloat = restricted_number_type("FinitePositiveFloat", float, [(">", 0), ("<", float("inf"))])
    NonNegativeFloat = restricted_number_type("FiniteNonNegativeFloat", float, [(">=", 0), ("<", float("inf"))])
    PositiveShare = restricted_number_type("PositiveShare", float, [(">", 0), ("<=", 1)])
    """A share in (0, 1]."""
    ShareBelowOne = restricted_number_type("ShareBelowOne", float, [(">=", 0), ("<", 1)])
    """A share in [0, 1)."""
    AboveOne = restricted_number_type("AboveOne", float, [(">", 1)])
    AtLeastOne = restricted_number_type("AtLeastOne", float, [(">=", 1), ("<", float("inf"))])
"""The command line's parser enforces these ranges. A parsed value is an instance of a subclass of int or float; convert
it with int() or float() before it goes into a checkpoint, which holds plain values alone."""


Measurements = Mapping[str, tuple[float, float]]
"""Metric name to (sum, count) on this rank; the metric is their ratio over all ranks, or the sum where count is 0."""


class Stage(StrEnum):
    """Training stage of a Lightning epoch."""

    SFT = "sft"
    EGSPO = "egspo"


Turn = tuple[str, str]
"""A message of a conversation: role (system, user or assistant) and text."""


class Problem(NamedTuple):
    """A question with its reference answer, as written by the source ("\\frac{1}{2}", "72")."""

    id: str
    problem: str
    answer: str
    """Empty if unknown: the problem can then be answered, but not graded or trained on."""
    subject: str = ""
    level: str = ""
    context: tuple[Turn, ...] = ()
    """Turns before the question. A system message comes first and replaces that of the prompt template."""
    columns: Mapping[str, Any] | None = None
    """Further columns of its row, for the reward."""


class Demonstration(NamedTuple):
    """A question with an expert's solution that ends in ``\\boxed{answer}``."""

    id: str
    problem: str
    solution: str
    context: tuple[Turn, ...] = ()
    """As of a ``Problem``."""
    columns: Mapping[str, Any] | None = None
    """As of a ``Problem``; used where the demonstration stands among rollouts."""


class ExpertSolution(NamedTuple):
    """Problem of a demonstration, with the tokens of its solution."""

    problem: Problem
    token_ids: list[int]
    """Solution tokens, with the EOS."""


class Sampling(NamedTuple):
    """Sampling settings of completions."""

    max_completion_length: PositiveInt
    """Length limit in tokens, EOS included."""
    temperature: NonNegativeFloat = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_p: PositiveShare = 1.0
    """Keep the fewest tokens whose probabilities add up to it (nucleus sampling); for evaluation only."""


class ProblemBatch(NamedTuple):
    """Problems of a benchmark, with sampling settings for their answers."""

    benchmark: str
    problems: list[Problem]
    num_samples: int
    sampling: Sampling


class Completion(NamedTuple):
    """One sampled completion with its grade."""

    problem: Problem
    token_ids: list[int]
    """Sampled tokens, with the EOS if one was sampled."""
    logprobs: list[float]
    """Log-probabilities that the engine reported, nats."""
    text: str
    """The decoded tokens, without special tokens other than think marks."""
    is_truncated: bool
    """The length limit was reached before an EOS."""
    reward: float
    correct: bool
    extracted: str | None
    """The answer found in the text."""
    status: str
    """graded, no_answer, timeout or crashed"""
    reward_terms: Mapping[str, float] = {}
    """Terms of a weighted reward, by name, before weights."""
    entropies: list[float] | None = None
    """Entropies of the distributions that the tokens were sampled from, nats; None if the engine reported none."""


class UpdateSize(NamedTuple):
    """Size of one optimizer step over all its micro-batches and ranks: the normalizers of its losses."""

    num_tokens: float
    """completion tokens"""
    num_sequences: float
    """sequences with at least one completion token"""
    max_length: float
    """the length limit of a completion, in tokens"""
    num_active_tokens: float
    """completion tokens of sequences that take part; rollouts of advantage 0 may be left out"""
    num_sampled_tokens: float
    """active tokens that the policy itself sampled"""


class ExpertBatch(NamedTuple):
    """A micro-batch of expert demonstrations."""

    input_ids: Tensor
    """(B, T) int64"""
    completion_mask: Tensor
    """(B, T) bool"""
    update_size: UpdateSize


class NetworkOutputs(NamedTuple):
    """Outputs of the networks for given sequences; all (B, T) float32, 0 outside the completions."""

    logprobs: Tensor
    """nats"""
    entropies: Tensor
    """nats"""
    values: Tensor | None = None
    """of the critic, if there is one; in units of the return"""
    ref_logprobs: Tensor | None = None
    """of the reference policy, if there is one, and only where rollouts are scored"""


class ScoredRollouts(NamedTuple):
    """Graded and scored completions of one rank's rollout batch: first G of each problem, then expert solutions."""

    input_ids: Tensor
    """(B, T) int64"""
    completion_mask: Tensor
    """(B, T) bool"""
    scores: NetworkOutputs
    """without gradient"""
    rewards: Tensor
    """(B,) float32"""
    is_truncated: Tensor
    """(B,) bool: the length limit was reached before an EOS"""
    group_size: int
    """G"""
    expert_groups: Tensor
    """(E,) int64: number of the group that each of the last E rows, expert solutions, belongs to"""
    problem_numbers: Tensor
    """(B,) int64: number of each row's problem in the rollout batch, over all ranks"""
    max_length: int
    """the length limit of a completion, in tokens"""
    policy_version: int
    """optimizer steps that the sampling policy had taken"""
    sampled_logprobs: Tensor | None = None
    """(B, T) float32, nats: as the engine reported them, NaN where it did not; None if equal to the scores"""
    number: int = 0
    """number of the rollout batch in the run, from 0"""

    @property
    def num_sampled(self) -> int:
        """Rows that the policy sampled: P * G."""
        return self.input_ids.shape[0] - self.expert_groups.shape[0]


class RolloutBatch(NamedTuple):
    """Rollouts ready for training: the whole rollout batch of one rank, or a micro-batch of it."""

    input_ids: Tensor
    """(B, T) int64"""
    completion_mask: Tensor
    """(B, T) bool"""
    old_logprobs: Tensor
    """(B, T) float32: log-probability, in nats, under the sampling policy, at the sampling temperature"""
    entropies: Tensor
    """(B, T) float32: entropy, in nats, of the distribution that each token was sampled from"""
    ref_logprobs: Tensor | None
    """(B, T) float32 under the reference policy; None if the loss has no KL term"""
    old_values: Tensor | None
    """(B, T) float32 of the critic at the time of sampling; None without one"""
    advantages: Tensor
    """(B, T) float32"""
    returns: Tensor | None
    """(B, T) float32: targets of the critic; None without one"""
    rewards: Tensor
    """(B,) float32"""
    is_expert: Tensor
    """(B,) bool: an expert solution, which the policy did not sample"""
    is_masked: Tensor
    """(B,) bool: left out of the loss, its normalizer and the gate: truncated, with ``mask_truncated``"""
    is_truncated: Tensor
    """(B,) bool: the length limit was reached before an EOS"""
    groups: Tensor
    """(B,) int64: number of the problem in the rollout batch, over all ranks"""
    members: Tensor
    """(B,) int64: number of the completion in its group; an expert solution comes after the G completions"""
    threshold: Tensor
    """(B, 1) float32, nats: tau, the entropy from which a token counts as high; -inf without a gate"""
    is_high: Tensor
    """(B, T) bool: tokens that take the full update, computed once with the sampling policy"""
    high_weights: Tensor
    """(B, T) float32: weights of the full update, s_t, computed once with the sampling policy"""
    low_weights: Tensor
    """(B, T) float32: weights of the low branch, (1 - s_t) phi_t, computed once with the sampling policy"""
    weight_scale: Tensor
    """(B, 1) float32: factor of all token weights, the same in every row"""
    policy_version: int
    """optimizer steps that the sampling policy had taken"""
    update_size: UpdateSize
    sampled_logprobs: Tensor | None = None
    """(B, T) float32, nats: as the engine reported them, NaN where it did not; None if equal to old_logprobs"""
    number: int = 0
    """number of the rollout batch in the run, from 0"""

    @property
    def sampled_mask(self) -> Tensor:
        """(B, T) bool: the tokens that the policy sampled itself, masked completions included."""
        return self.completion_mask & ~self.is_expert.unsqueeze(1)

    @property
    def loss_mask(self) -> Tensor:
        """(B, T) bool: the tokens that the loss and its normalizer count."""
        return self.completion_mask & ~self.is_masked.unsqueeze(1)

    @property
    def gated_mask(self) -> Tensor:
        """(B, T) bool: the tokens that the gate ranks and weights: those of the loss that the policy sampled."""
        return self.loss_mask & self.sampled_mask


class TrainingBatch(NamedTuple):
    """Batch of ``training_step``: expert data in stage SFT; rollouts and, if mu > 0, expert data in stage EGSPO."""

    stage: Stage
    rollout: RolloutBatch | None
    expert: ExpertBatch | None
