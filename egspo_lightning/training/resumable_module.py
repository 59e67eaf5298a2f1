"""The networks of a run in checkpoints: what is kept, and how a checkpoint's becomes this run's."""

from functools import cached_property
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from egspo_lightning.checkpointing.adapt import adapt_optimizer, adapt_weights, number_parameters
from egspo_lightning.checkpointing.compatibility import (
    fit_optimizer_kind,
    require_same_shapes,
    require_same_tokenizer,
    tokenizer_digest,
)
from egspo_lightning.checkpointing.random_state import random_state, restore_random_state
from egspo_lightning.errors import UserError
from egspo_lightning.models import lora
from egspo_lightning.training.policy_module import PolicyModule
from egspo_lightning.types import Stage


class ResumableModule(PolicyModule):
    """A ``PolicyModule`` that goes on from a checkpoint as if it had not been interrupted."""

    loaded_step = 0
    """Optimizer steps that the latest checkpoint to be loaded has taken."""
    _random_state: dict[str, Any] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the stage, the steps at the start of phase and stage, and every rank's random state.

        What is frozen under adapters is left out.
        """
        for name in self._left_out():
            checkpoint["state_dict"].pop(name, None)
        checkpoint["egspo"] = {
            "stage": str(self.stage),
            "phase_version": self._phase_version,
            "previous_version": self._previous_version,
            "entered_step": self.entered_step,
            "random": self.collect_over_ranks(random_state()),
            "tokenizer": self._tokenizer_digest,
            "optimizer": type(self.optimizers(use_pl_optimizer=False)).__name__,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the stage; fit the checkpoint's networks to this run's."""
        if "egspo" not in checkpoint:
            raise UserError("ckpt_path: this checkpoint was not written by EGSPOModule.")
        state = checkpoint["egspo"]
        self.loaded_step = checkpoint["global_step"]
        self.stage, self._phase_version = Stage(state["stage"]), state["phase_version"]
        self._previous_version = state.get("previous_version", self._phase_version)
        self.entered_step = state["entered_step"]
        is_entry = self.stage == Stage.EGSPO and checkpoint["global_step"] == self.entered_step
        is_fit = self.trainer.state.fn == TrainerFn.FITTING  # whoever only measures needs the policy alone
        if is_fit and self.has_reference and self.policy_config.lora is not None:
            self._require_same_reference()
        if is_fit and not is_entry:
            self._take_up_random_state(state.get("random", []))
        is_exact = is_entry or self.stage == Stage.SFT or not is_fit
        weights = checkpoint.get("state_dict", {})
        own = self.state_dict() if weights else {}
        adapt_weights(weights, own, is_exact=is_exact, left_out=self._left_out())
        require_same_shapes(weights, own)
        require_same_tokenizer(state.get("tokenizer"), self._tokenizer_digest)
        if is_fit and (states := checkpoint.get("optimizer_states")):
            self._fit_optimizer(states, state.get("optimizer"), is_entry=is_entry)

    def _require_same_reference(self) -> None:
        """With adapters, what the reference is hangs on whether SFT came before EGSPO, in the checkpoint as in the run.

        Raises:
            UserError: SFT came, or will come, before EGSPO in one of them alone.
        """
        began_with_egspo = self.stage == Stage.EGSPO and self.entered_step == 0
        if self.base_is_reference and not began_with_egspo:
            raise UserError(
                "model.initial_stage: egspo takes the model without its adapter as the reference, but the checkpoint's "
                "adapter was trained by SFT, and its reference is the adapter of the end of SFT. Set "
                "model.initial_stage to sft: the run goes on in the checkpoint's stage all the same."
            )
        if began_with_egspo and not self.base_is_reference:
            raise UserError(
                "model.initial_stage: sft keeps the adapter of the end of SFT as the reference, but the checkpoint's "
                "run began with stage EGSPO, and its reference is the model without adapter. Set model.initial_stage "
                "to egspo."
            )

    def _fit_optimizer(self, states: list[dict[str, Any]], saved_kind: str | None, *, is_entry: bool) -> None:
        """Make a checkpoint's optimizer this run's."""
        policy, critic = self._trained_parameters()
        numbers = {id(parameter): number for number, parameter in enumerate([*policy, *critic])}
        number_parameters(states, {name: numbers[id(p)] for name, p in self.named_parameters() if id(p) in numbers})
        optimizer = self._build_optimizer()
        fresh, kind = optimizer.state_dict(), type(optimizer).__name__
        fit_optimizer_kind(states, saved_kind, fresh, kind, is_entry=is_entry)
        adapt_optimizer(states, fresh, is_entry=is_entry)

    def on_train_start(self) -> None:
        """Go on with the random numbers of the run that is resumed: until here, starting has drawn some."""
        if self._random_state is not None:
            restore_random_state(self._random_state)
            self._random_state = None

    def _take_up_random_state(self, states: list[Any]) -> None:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        if len(states) not in (0, world_size):
            rank_zero_info(
                f"The checkpoint was written on {len(states)} ranks, and this run has {world_size}: it goes on with "
                "the same data, but sums over ranks are rounded otherwise, so it is not bit-identical."
            )
        self._random_state = states[rank] if rank < len(states) else None

    def _left_out(self) -> set[str]:
        """Names of what checkpoints need not hold: frozen weights under adapters, where they can be loaded again."""
        config, critic = self.policy_config, self.critic_config
        is_own = critic is not None and critic.model is not None and critic.model.from_scratch
        if config.lora is None or config.from_scratch or is_own:
            return set()
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name for name in self.state_dict() if name not in trained and not lora.is_adapter(name)}

    @cached_property
    def _tokenizer_digest(self) -> str:
        """It sorts the whole vocabulary, so once a run."""
        return tokenizer_digest(self.tokenizer)
