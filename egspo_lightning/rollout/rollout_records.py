"""Records of a rollout batch on one rank, from its prompts to its checkpoint state.

The state holds plain values and tensors alone, which ``torch.load(weights_only=True)`` reads.
"""

from typing import Any, NamedTuple, TypeVar

from egspo_lightning.checkpointing.serialization import from_plain, to_plain
from egspo_lightning.types import Completion, ExpertSolution, Measurements, Problem, RolloutBatch, ScoredRollouts


class Prompt(NamedTuple):
    """An encoded problem with the name of its random stream."""

    problem: Problem
    token_ids: list[int]
    seed: str


class DrawnProblems(NamedTuple):
    """This rank's problems of a rollout batch, by their place in it."""

    number: int
    """Number of the rollout batch."""
    prompts: dict[int, Prompt]
    solutions: dict[int, ExpertSolution]
    """Expert solutions of the problems that have one."""


class Group(NamedTuple):
    """The completions of one problem."""

    number: int
    """Place of the problem in the rollout batch."""
    prompt: Prompt
    completions: list[Completion]
    expert: Completion | None
    """The expert's solution, graded like a completion."""

    @property
    def is_flat(self) -> bool:
        """Whether all rewards are equal, so that comparing them teaches nothing."""
        return len({completion.reward for completion in self.completions}) == 1


class SampledGroups(NamedTuple):
    """This rank's graded groups of a rollout batch, in the order of their places."""

    groups: list[Group]
    discarded: list[Group]
    """Flat groups that others have replaced."""
    seconds: float
    """Time to sample and grade."""
    seconds_grading: float
    """The part of this time with nothing left to sample, spent waiting for grades."""
    has_experts: bool = False
    """Whether the rollout batch has expert solutions, on any rank."""

    def replace(self, others: "SampledGroups") -> "SampledGroups":
        """These groups with others in their places, and the time for both."""
        new = {group.number: group for group in others.groups}
        return self._replace(
            groups=[new.get(group.number, group) for group in self.groups],
            discarded=self.discarded + [group for group in self.groups if group.number in new],
            seconds=self.seconds + others.seconds,
            seconds_grading=self.seconds_grading + others.seconds_grading,
        )


class ScoredGroups(NamedTuple):
    """A rollout batch, sampled, graded and scored, before advantages and gate."""

    completions: list[Completion]
    """In the order of the rollouts' rows."""
    rollouts: ScoredRollouts
    measurements: Measurements
    numbers: list[int]
    """Places of this rank's problems in the rollout batch, in the order of their groups."""
    num_drawn: int
    """Problems drawn so far, those of this rollout batch included, over all ranks."""


class CollectedRollouts(NamedTuple):
    """A rollout batch, ready for optimizer steps."""

    completions: list[Completion]
    """In the order of the rows: G for each problem, then the expert solutions."""
    batch: RolloutBatch
    numbers: list[int]
    """Places of this rank's problems in the rollout batch, in the order of their groups."""
    expert_groups: list[int]
    """For each expert row, the number of its group on this rank."""


RecordT = TypeVar("RecordT", ScoredGroups, CollectedRollouts)


def pack(record: ScoredGroups | CollectedRollouts) -> dict[str, Any]:
    """Turn a rollout batch into plain values and tensors on the CPU, for a checkpoint.

    The engine's statistics of each token are left out: the tensors hold them, and as lists they take 64 bytes a token.
    """
    completions = [_pack_completion(completion) for completion in record.completions]
    return {**to_plain(record), "completions": completions}


def unpack(kind: type[RecordT], state: dict[str, Any], device: Any) -> RecordT:
    """Restore a rollout batch, its tensors on a device."""
    completions = [Completion(**{**it, "problem": Problem(*it["problem"])}) for it in state["completions"]]
    return from_plain(kind, {**state, "completions": completions}, device)


def _pack_completion(completion: Completion) -> dict[str, Any]:
    packed = completion._replace(logprobs=[], entropies=None)._asdict()
    return packed | {"problem": list(completion.problem), "reward_terms": dict(completion.reward_terms)}
