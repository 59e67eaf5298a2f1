"""A collection as plain values and tensors, which a checkpoint holds and ``torch.load(weights_only=True)`` reads."""

from typing import Any

from egspo_lightning.plain import from_plain, to_plain
from egspo_lightning.rollout.experience import Collection
from egspo_lightning.types import Completion, Problem, RolloutBatch


def pack(collection: Collection) -> dict[str, Any]:
    """All that updates and callbacks still ask of a collection.

    What the engine told of each token is left out: it stands in the rollout, and as lists it takes 64 bytes a token.
    """
    return {
        "completions": [_pack_completion(completion) for completion in collection.completions],
        "rollout": to_plain(collection.rollout),
        "measurements": {name: list(pair) for name, pair in collection.measurements.items()},
        "numbers": list(collection.numbers),
        "expert_groups": list(collection.expert_groups),
    }


def unpack(state: dict[str, Any], device: Any) -> Collection:
    """The collection, its tensors on a device."""
    return Collection(
        completions=[_unpack_completion(completion) for completion in state["completions"]],
        rollout=from_plain(RolloutBatch, state["rollout"], device),
        measurements={name: (total, count) for name, (total, count) in state["measurements"].items()},
        numbers=state["numbers"],
        expert_groups=state["expert_groups"],
    )


def _pack_completion(completion: Completion) -> dict[str, Any]:
    packed = completion._replace(logprobs=[], entropies=None)._asdict()
    return packed | {"problem": list(completion.problem), "reward_terms": dict(completion.reward_terms)}


def _unpack_completion(packed: dict[str, Any]) -> Completion:
    return Completion(**(packed | {"problem": Problem(*packed["problem"])}))
