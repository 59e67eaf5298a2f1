"""Mid-epoch resume state: position in the phase, and checks that the config still matches."""

import json
from dataclasses import dataclass, replace
from typing import Any

from egspo_lightning.errors import UserError


@dataclass
class MidEpochPosition:
    """Position within one phase.

    Args:
        num_micro_batches: Micro-batches of each optimizer step, on each rank.
        length: Micro-batches of the whole phase.
        max_tokens: Token budget of a micro-batch, if any.
        num_given: Micro-batches given to the trainer so far.
        rollouts: This rank's rollout batch, when read from a checkpoint of stage EGSPO; otherwise None.
    """

    num_micro_batches: int = 0
    length: int = 0
    max_tokens: int | None = None
    num_given: int = 0
    rollouts: dict[str, Any] | None = None

    def state_dict(self, rollouts: list[dict[str, Any] | None]) -> dict[str, Any]:
        """Plain values for a checkpoint, with the rollout batches of all ranks."""
        return vars(self) | {"rollouts": rollouts}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], rank: int, world_size: int) -> "MidEpochPosition":
        """Read the position, and one rank's rollout batch, from a checkpoint.

        Raises:
            UserError: the checkpoint was saved on another number of ranks.
        """
        saved = len(state["rollouts"])
        if saved != world_size:
            raise UserError(
                f"ckpt_path: this is a mid-epoch checkpoint from {saved} ranks, and this run has {world_size}. Resume "
                f"on {saved}, or from a checkpoint of the end of an epoch."
            )
        return cls(**state | {"rollouts": state["rollouts"][rank]})

    def resume(self, num_steps: int, num_micro_batches: int, max_tokens: int | None) -> "MidEpochPosition":
        """Move the position into this config's phase; a token budget keeps the saved ``num_micro_batches``.

        Raises:
            UserError: this config has a different number of optimizer steps or micro-batches than the checkpoint.
        """
        if max_tokens != self.max_tokens:
            raise UserError(
                "ckpt_path: this is a mid-epoch checkpoint of a run with data.max_tokens_per_micro_batch = "
                f"{json.dumps(self.max_tokens)}, and this config has {json.dumps(max_tokens)}. Resume with the "
                "checkpoint's value, or from a checkpoint of the end of an epoch."
            )
        number = num_micro_batches if max_tokens is None else self.num_micro_batches
        if num_steps * number != self.length:
            flags = "data.num_minibatches or trainer.accumulate_grad_batches differ"
            raise UserError(
                f"ckpt_path: this is a mid-epoch checkpoint of a phase of {self.length} micro-batches per rank, and "
                f"with this config a phase has {num_steps * number}: the demonstrations, data.sft_batch_size, "
                f"data.num_ppo_epochs, {flags if max_tokens is None else 'or data.num_minibatches differ'}. Resume "
                "with the checkpoint's values, or from a checkpoint of the end of an epoch."
            )
        return replace(self, num_micro_batches=number, rollouts=None)
