"""A phase that a checkpoint was made in: what is kept of it, and whether it can go on as it began."""

from typing import Any, NamedTuple

from egspo_lightning.errors import UserError


class CutOff(NamedTuple):
    """A phase that is under way."""

    num_given: int
    """Micro-batches that were trained on."""
    length: int
    """Micro-batches of the whole phase."""
    parts: int
    """Micro-batches an update."""
    max_tokens: int | None
    """Tokens of a micro-batch at most."""
    packed: dict[str, Any] | None
    """This rank's rollouts, in stage EGSPO."""

    def state_dict(self, collections: list[dict[str, Any] | None]) -> dict[str, Any]:
        """For a checkpoint, with the rollouts of every rank."""
        return {name: value for name, value in self._asdict().items() if name != "packed"} | {
            "collections": collections
        }

    @classmethod
    def of_checkpoint(cls, state: dict[str, Any], rank: int, world_size: int) -> "CutOff":
        """That of this rank.

        Raises:
            UserError: another number of ranks shared its data.
        """
        saved = len(state["collections"])
        if saved != world_size:
            raise UserError(
                f"ckpt_path: the checkpoint was made within a phase whose data {saved} ranks shared, and this run has "
                f"{world_size}. Resume on {saved}, or from a checkpoint of the end of a phase."
            )
        parts, max_tokens = state.get("parts", 0), state.get("max_tokens")  # absent from before there was a bound
        return cls(state["num_given"], state["length"], parts, max_tokens, state["collections"][rank])

    def parts_now(self, num_updates: int, parts: int, max_tokens: int | None) -> int:
        """Micro-batches an update with which it goes on.

        Args:
            num_updates: those of the phase, by this config
            parts: micro-batches an update, where there is no bound
            max_tokens: the bound of this config

        Raises:
            UserError: it was cut otherwise.
        """
        if max_tokens != self.max_tokens:
            raise UserError(
                "ckpt_path: the checkpoint was made within a phase whose micro-batches were cut with "
                f"data.max_tokens_per_micro_batch = {_shown(self.max_tokens)}, and this config has "
                f"{_shown(max_tokens)}. Resume with that of the checkpoint, or from a checkpoint of the end of a phase."
            )
        parts = parts if max_tokens is None else self.parts
        flag = "data.num_minibatches or trainer.accumulate_grad_batches differ"
        if max_tokens is not None:
            flag = "or data.num_minibatches differ"
        if num_updates * parts != self.length:
            raise UserError(
                f"ckpt_path: the checkpoint was made within a phase of {self.length} micro-batches a rank, and with "
                f"this config a phase has {num_updates * parts}: the demonstrations, data.sft_batch_size, "
                f"data.num_ppo_epochs, {flag}. Resume with those of the "
                "checkpoint, or from a checkpoint of the end of a phase."
            )
        return parts


def _shown(value: int | None) -> str:
    """As a config has it."""
    return "null" if value is None else str(value)
