"""A collection as plain values and tensors, which a checkpoint holds and ``torch.load(weights_only=True)`` reads."""

from typing import Any

from egspo_lightning.checkpointing.serialization import from_plain, to_plain
from egspo_lightning.rollout.scoring import CollectedRollouts, ScoredGroups
from egspo_lightning.types import Completion, Measurements, Problem, RolloutBatch, ScoredRollouts


def pack(rollouts: CollectedRollouts) -> dict[str, Any]:
    """All that updates and callbacks still ask of a rollout batch.

    What the engine told of each token is left out: it stands in the rollout, and as lists it takes 64 bytes a token.
    """
    return {
        "completions": [_pack_completion(completion) for completion in rollouts.completions],
        "rollout": to_plain(rollouts.batch),
        "measurements": _pack_measurements(rollouts.measurements),
        "numbers": list(rollouts.numbers),
        "expert_groups": list(rollouts.expert_groups),
    }


def unpack(state: dict[str, Any], device: Any) -> CollectedRollouts:
    """The rollouts, its tensors on a device."""
    return CollectedRollouts(
        completions=[_unpack_completion(completion) for completion in state["completions"]],
        batch=from_plain(RolloutBatch, state["rollout"], device),
        measurements=_unpack_measurements(state["measurements"]),
        numbers=state["numbers"],
        expert_groups=state["expert_groups"],
    )


def pack_scored(prepared: ScoredGroups) -> dict[str, Any]:
    """The same of a collection that has yet to be admitted; what scores say of its tokens is kept, as in ``pack``."""
    return {
        "completions": [_pack_completion(completion) for completion in prepared.completions],
        "rollouts": to_plain(prepared.rollouts),
        "measurements": _pack_measurements(prepared.measurements),
        "numbers": list(prepared.numbers),
        "num_drawn": prepared.num_drawn,
    }


def unpack_scored(state: dict[str, Any], device: Any) -> ScoredGroups:
    """The rollouts, its tensors on a device."""
    return ScoredGroups(
        completions=[_unpack_completion(completion) for completion in state["completions"]],
        rollouts=from_plain(ScoredRollouts, state["rollouts"], device),
        measurements=_unpack_measurements(state["measurements"]),
        numbers=state["numbers"],
        num_drawn=state["num_drawn"],
    )


def _pack_measurements(measurements: Measurements) -> dict[str, list[float]]:
    return {name: list(pair) for name, pair in measurements.items()}


def _unpack_measurements(packed: dict[str, list[float]]) -> Measurements:
    return {name: (total, count) for name, (total, count) in packed.items()}


def _pack_completion(completion: Completion) -> dict[str, Any]:
    packed = completion._replace(logprobs=[], entropies=None)._asdict()
    return packed | {"problem": list(completion.problem), "reward_terms": dict(completion.reward_terms)}


def _unpack_completion(packed: dict[str, Any]) -> Completion:
    return Completion(**(packed | {"problem": Problem(*packed["problem"])}))
