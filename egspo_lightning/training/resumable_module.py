"""Base LightningModule: optimizer, and checkpoints from which a run resumes as if it had never stopped."""

from functools import cached_property
from typing import Any, NoReturn

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from egspo_lightning.checkpointing.adapt import (
    adapt_optimizer,
    adapt_weights,
    number_parameters,
    require_same_tokenizer,
    tokenizer_digest,
)
from egspo_lightning.checkpointing.random_state import random_state, restore_random_state
from egspo_lightning.errors import UserError
from egspo_lightning.models import lora
from egspo_lightning.models.critic import Critic, CriticConfig
from egspo_lightning.models.policy import Policy
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.training.collectives import Collectives
from egspo_lightning.training.optimizers import build_optimizer, build_scheduler, require_rate_kept
from egspo_lightning.types import PositiveFloat, Stage

STEPS = ("phase_version", "previous_version", "egspo_start_step")
"""Attributes of the module that count optimizer steps, as checkpoints hold them."""


class ResumableModule(Collectives):
    """Optimizes policy and critic, which ``configure_model`` of a subclass builds, and resumes from a checkpoint.

    Args:
        policy: The model.
        critic: Estimates values; None trains without a critic.
        has_reference: Whether to keep a reference policy: the policy at the start of stage EGSPO.
        temperature: Sampling temperature of the rollouts.
        optimizer: The optimizer, over all trainable parameters.
        lr_scheduler: Learning-rate schedule over optimizer steps; None is constant.
        initial_stage: The stage in which a run starts.
    """

    stage: Stage
    """The stage in training."""
    phase_version: int
    previous_version: int
    """Optimizer steps at the start of this phase and of the one before."""
    egspo_start_step: int
    """Optimizer steps at the start of stage EGSPO."""
    loaded_step: int
    """Optimizer steps that the checkpoint of this run had taken; 0 without one."""
    _random_state: dict[str, Any] | None
    """Random state of a resumed checkpoint, until training starts."""

    def __init__(
        self,
        policy: PolicyConfig,
        critic: CriticConfig | None,
        has_reference: bool,
        temperature: PositiveFloat,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        initial_stage: Stage,
    ) -> None:
        super().__init__()
        self.policy_config, self.critic_config, self.has_reference = policy, critic, has_reference
        self.temperature = float(temperature)
        self.policy: Policy | None = None
        self.reference: Policy | None = None
        self.critic: Critic | None = None
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self.initial_stage = initial_stage

    def start_run(self) -> None:
        """Set all state of a run to its beginning. Weights stay, and a checkpoint is loaded later."""
        self.stage = self.initial_stage
        self.phase_version = self.previous_version = self.egspo_start_step = self.loaded_step = 0
        self._random_state = None

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's tokenizer, loaded at its first use."""
        return self.policy_config.load_tokenizer()

    @property
    def _policy(self) -> Policy:
        assert self.policy is not None, "configure_model has not run"
        return self.policy

    # Optimizer

    def configure_optimizers(self) -> Any:
        """Build the optimizer of the trained parameters, and its schedule over optimizer steps."""
        optimizer = self._build_optimizer()
        if self._lr_scheduler is None:
            return optimizer
        scheduler = build_scheduler(self._lr_scheduler, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _build_optimizer(self) -> Optimizer:
        policy, critic = self._trained_parameters()
        if not critic:
            return build_optimizer(self._optimizer, policy)
        rate = self.critic_config.learning_rate if self.critic_config is not None else None
        groups = [{"params": policy}, {"params": critic} | ({} if rate is None else {"lr": float(rate)})]
        return build_optimizer(self._optimizer, groups)

    def _trained_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Trained parameters of the policy, and of the critic."""
        heads = [part for part in (self._policy.value_head, self.critic) if part is not None]
        critic = [p for part in heads for p in part.parameters() if p.requires_grad]
        return [p for p in self._policy.lm.parameters() if p.requires_grad], critic

    def require_rate_kept(self, field: str, learning_rate: float | None, *, of_critic: bool = False) -> None:
        """Refuse a learning rate of policy or critic that the schedule would replace by its own.

        Raises:
            UserError: naming the field and the schedule.
        """
        if self._lr_scheduler is not None and learning_rate is not None:
            groups = {"group": int(of_critic), "num_groups": 1 if self.critic_config is None else 2}
            require_rate_kept(self._optimizer, self._lr_scheduler, field, float(learning_rate), **groups)

    def restart_optimizer(self, learning_rate: float | None) -> None:
        """Clear the optimizer's moments and restart its schedule, from the given or the configured learning rate.

        A critic with its own learning rate keeps it.
        """
        (optimizer,) = self.trainer.optimizers
        optimizer.state.clear()
        critic_rate = None if self.critic_config is None else self.critic_config.learning_rate
        for rate, group in zip((learning_rate, critic_rate or learning_rate), optimizer.param_groups, strict=False):
            group.pop("initial_lr", None)
            group["lr"] = optimizer.defaults["lr"] if rate is None else float(rate)
        for config in self.trainer.lr_scheduler_configs:
            assert self._lr_scheduler is not None
            config.scheduler = build_scheduler(self._lr_scheduler, optimizer)

    # Checkpoints

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: checkpoints do not hold the arguments of the constructor.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{cls.__name__}.load_from_checkpoint: checkpoints do not hold the model's config. Build {cls.__name__} "
            "from the config, and give ckpt_path to trainer.fit, validate, test or predict; or load the folder that "
            "HFExport writes with transformers."
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the stage, step counters and the random state of each rank.

        Base weights under LoRA are not saved if they reload from the pretrained model.
        """
        for name in self._left_out():
            checkpoint["state_dict"].pop(name, None)
        checkpoint["egspo"] = {name: getattr(self, name) for name in STEPS} | {
            "stage": str(self.stage),
            "random": self.collect_over_ranks(random_state()),
            "num_threads": torch.get_num_threads(),
            "tokenizer": self._tokenizer_digest,
            "optimizer": type(self.trainer.optimizers[0]).__name__,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the stage, and fit the checkpoint's weights and optimizer states to this run's networks."""
        if "egspo" not in checkpoint:
            raise UserError("ckpt_path: this checkpoint was not written by EGSPOModule.")
        state = checkpoint["egspo"]
        for name in STEPS:
            setattr(self, name, state[name])
        self.stage, self.loaded_step = Stage(state["stage"]), checkpoint["global_step"]
        is_entry = self.stage == Stage.EGSPO and self.loaded_step == self.egspo_start_step
        is_fit = self.trainer.state.fn == TrainerFn.FITTING  # evaluation needs the policy alone
        is_exact = is_entry or self.stage == Stage.SFT or not is_fit
        begins_with_egspo = self.stage == Stage.EGSPO and self.egspo_start_step == 0
        adapt_weights(
            checkpoint.get("state_dict", {}),
            self.state_dict(),
            is_exact=is_exact,
            begins_with_egspo=begins_with_egspo,
            left_out=self._left_out(),
        )
        require_same_tokenizer(state["tokenizer"], self._tokenizer_digest)
        if is_fit and not is_entry:
            self._keep_random_state(state["random"])
        if is_fit:
            self._compare_threads(state.get("num_threads"))
        if is_fit and checkpoint.get("optimizer_states"):
            self._adapt_optimizer(checkpoint, is_entry=is_entry)

    def _keep_random_state(self, states: list[dict[str, Any]]) -> None:
        """Keep this rank's random state until training starts, if the checkpoint has one for it."""
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        self._random_state = states[rank] if rank < len(states) else None
        if len(states) != world_size:
            rank_zero_info(
                f"The checkpoint was written on {len(states)} ranks, and this run has {world_size}: it goes on with "
                "the same data, but sums over ranks are rounded otherwise, so it is not bit-identical."
            )

    def _compare_threads(self, saved: int | None) -> None:
        """Say that the run does not continue bit for bit on another number of threads; devices do not depend on it."""
        current = torch.get_num_threads()
        if saved not in (None, current) and self.trainer.strategy.root_device.type == "cpu":
            rank_zero_info(
                f"The checkpoint was written with {saved} torch threads, and this run has {current}: sums are rounded "
                f"otherwise, so it is not bit-identical. Set num_threads: {saved} (in Python: torch.set_num_threads) "
                "to continue exactly."
            )

    def _adapt_optimizer(self, checkpoint: dict[str, Any], *, is_entry: bool) -> None:
        """Change the checkpoint's optimizer states, in place, to those of this run's optimizer."""
        states, optimizer = checkpoint["optimizer_states"], self._build_optimizer()
        policy, critic = self._trained_parameters()
        numbers = {id(parameter): number for number, parameter in enumerate([*policy, *critic])}
        number_parameters(states, {name: numbers[id(p)] for name, p in self.named_parameters() if id(p) in numbers})
        saved_kind, kind = checkpoint["egspo"]["optimizer"], type(optimizer).__name__
        adapt_optimizer(states, saved_kind, optimizer.state_dict(), kind, is_entry=is_entry)

    def on_train_start(self) -> None:
        """Restore the random state of the resumed run here, because startup code also draws random numbers."""
        if self._random_state is not None:
            restore_random_state(self._random_state)
            self._random_state = None

    def _left_out(self) -> set[str]:
        """Names of weights left out of checkpoints: base weights under LoRA, which reload from the pretrained model."""
        config, critic = self.policy_config, self.critic_config
        is_own = critic is not None and critic.model is not None and critic.model.from_scratch
        if config.lora is None or config.from_scratch or is_own:
            return set()
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name for name in self.state_dict() if name not in trained and not lora.is_adapter(name)}

    @cached_property
    def _tokenizer_digest(self) -> str:
        return tokenizer_digest(self.tokenizer)  # sorts the whole vocabulary, so cached
