"""Mid-epoch resume state: how far a phase has come, and whether a resumed run can continue it as it began."""

import json
from dataclasses import dataclass
from typing import Any

from egspo_lightning.errors import UserError


@dataclass
class PhaseProgress:
    """Position within one phase.

    Args:
        num_micro_batches: Micro-batches of each optimizer step, on each rank.
        length: Micro-batches of the whole phase.
        max_tokens: Token budget of a micro-batch, if any.
        num_given: Micro-batches that the trainer has received.
        rollouts: In a loaded checkpoint, this rank's rollout batch; None in stage SFT.
    """

    num_micro_batches: int = 0
    length: int = 0
    max_tokens: int | None = None
    num_given: int = 0
    rollouts: dict[str, Any] | None = None

    @property
    def is_within(self) -> bool:
        """Whether some micro-batches of the phase are done and others are left."""
        return 0 < self.num_given < self.length

    def state_dict(self, rollouts: list[dict[str, Any] | None]) -> dict[str, Any]:
        """Plain values for a checkpoint, with the rollout batches of all ranks."""
        return {
            "num_given": self.num_given,
            "length": self.length,
            "parts": self.num_micro_batches,
            "max_tokens": self.max_tokens,
            "collections": rollouts,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], rank: int, world_size: int) -> "PhaseProgress":
        """The progress that a checkpoint holds for one rank.

        Raises:
            UserError: the checkpoint was saved on another number of ranks.
        """
        saved = len(state["collections"])
        if saved != world_size:
            raise UserError(
                f"ckpt_path: the checkpoint was made within a phase whose data {saved} ranks shared, and this run has "
                f"{world_size}. Resume on {saved}, or from a checkpoint of the end of a phase."
            )
        parts, max_tokens = state.get("parts", 0), state.get("max_tokens")  # older checkpoints have no budget
        return cls(parts, state["length"], max_tokens, state["num_given"], state["collections"][rank])

    def resume(self, num_steps: int, num_micro_batches: int, max_tokens: int | None) -> "PhaseProgress":
        """The same position in a phase of this config: ``num_micro_batches`` a step where there is no token budget.

        Raises:
            UserError: this config splits the phase in another way than the checkpoint's.
        """
        if max_tokens != self.max_tokens:
            raise UserError(
                "ckpt_path: the checkpoint was made within a phase whose micro-batches were cut with "
                f"data.max_tokens_per_micro_batch = {json.dumps(self.max_tokens)}, and this config has "
                f"{json.dumps(max_tokens)}. Resume with the checkpoint's, or from a checkpoint of the end of a phase."
            )
        number = num_micro_batches if max_tokens is None else self.num_micro_batches
        if num_steps * number != self.length:
            flags = "data.num_minibatches or trainer.accumulate_grad_batches differ"
            raise UserError(
                f"ckpt_path: the checkpoint was made within a phase of {self.length} micro-batches a rank, and with "
                f"this config a phase has {num_steps * number}: the demonstrations, data.sft_batch_size, "
                f"data.num_ppo_epochs, {flags if max_tokens is None else 'or data.num_minibatches differ'}. Resume "
                "with those of the checkpoint, or from a checkpoint of the end of a phase."
            )
        return PhaseProgress(number, self.length, max_tokens, self.num_given)
