"""Checkpoint state of rollouts: plain values and tensors, which ``torch.load(weights_only=True)`` reads."""

from typing import Any

from egspo_lightning.checkpointing.serialization import from_plain, to_plain
from egspo_lightning.rollout.scoring import CollectedRollouts, ScoredGroups
from egspo_lightning.types import Completion, Problem, RolloutBatch, ScoredRollouts


def pack(rollouts: CollectedRollouts | ScoredGroups) -> dict[str, Any]:
    """Turn a rollout batch into plain values and tensors on the CPU, for a checkpoint.

    The engine's statistics of each token are left out: the tensors hold them, and as lists they take 64 bytes a token.
    """
    plain = {
        "completions": [_pack_completion(completion) for completion in rollouts.completions],
        "measurements": {name: list(pair) for name, pair in rollouts.measurements.items()},
    }
    return {
        name: to_plain(value) if isinstance(value, RolloutBatch | ScoredRollouts) else value
        for name, value in (rollouts._asdict() | plain).items()
    }


def unpack(state: dict[str, Any], device: Any) -> CollectedRollouts:
    """Restore a rollout batch, its tensors on a device."""
    return CollectedRollouts(**_unpack_lists(state) | {"batch": from_plain(RolloutBatch, state["batch"], device)})


def unpack_scored(state: dict[str, Any], device: Any) -> ScoredGroups:
    """Restore scored groups, their tensors on a device."""
    return ScoredGroups(**_unpack_lists(state) | {"rollouts": from_plain(ScoredRollouts, state["rollouts"], device)})


def _unpack_lists(state: dict[str, Any]) -> dict[str, Any]:
    return state | {
        "completions": [_unpack_completion(completion) for completion in state["completions"]],
        "measurements": {name: tuple(pair) for name, pair in state["measurements"].items()},
    }


def _pack_completion(completion: Completion) -> dict[str, Any]:
    packed = completion._replace(logprobs=[], entropies=None)._asdict()
    return packed | {"problem": list(completion.problem), "reward_terms": dict(completion.reward_terms)}


def _unpack_completion(packed: dict[str, Any]) -> Completion:
    return Completion(**(packed | {"problem": Problem(*packed["problem"])}))
