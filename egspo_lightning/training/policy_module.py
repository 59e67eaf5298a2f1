"""Base LightningModule: builds, shards, optimizes and checkpoints the networks, and lets rollouts sample and score.

It implements ``rollout.policy_protocol.RolloutPolicy``. ``EGSPOModule`` adds the training step.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from egspo_lightning.checkpointing.adapt import adapt_weights
from egspo_lightning.checkpointing.compatibility import require_same_shapes, require_same_tokenizer, tokenizer_digest
from egspo_lightning.checkpointing.random_state import random_state, restore_random_state
from egspo_lightning.errors import UserError
from egspo_lightning.models import lora
from egspo_lightning.models.critic import Critic, CriticConfig
from egspo_lightning.models.fsdp import shard
from egspo_lightning.models.inference import InferenceMode
from egspo_lightning.models.networks import Networks
from egspo_lightning.models.policy import Policy, end_of_sequence_ids
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.models.snapshot import Snapshot
from egspo_lightning.training import module_checkpoint
from egspo_lightning.training.optimizers import build_optimizer, build_scheduler
from egspo_lightning.training.setup_rules import require_precision
from egspo_lightning.training.strategies import require_strategy, sharding_plan
from egspo_lightning.types import PositiveFloat, Scores, Stage


class PolicyModule(LightningModule):
    """Holds policy, reference policy and critic, and resumes from a checkpoint as if the run had never stopped.

    Args:
        policy: The model.
        critic: Estimates values; None trains without a critic.
        has_reference: Whether to keep a reference policy: the policy at the start of stage EGSPO.
        temperature: Sampling temperature of the rollouts.
        optimizer: The optimizer, over all trainable parameters.
        lr_scheduler: Learning-rate schedule over optimizer steps; None is constant.
        stage: The stage to start in.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        critic: CriticConfig | None,
        has_reference: bool,
        temperature: PositiveFloat,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        stage: Stage,
    ) -> None:
        super().__init__()
        self.policy_config, self.critic_config, self.has_reference = policy, critic, has_reference
        self.base_is_reference = has_reference and policy.lora is not None and stage == Stage.EGSPO
        """Whether the reference policy is the base model without LoRA, as in runs without SFT."""
        self.temperature = float(temperature)
        self.stage = stage
        self.policy: Policy | None = None
        self.reference: Policy | None = None
        self.critic: Critic | None = None
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._phase_version = self._previous_version = 0  # optimizer steps at the start of this and the last phase
        self.entered_step = 0
        """Optimizer steps taken when stage EGSPO was entered."""
        self.loaded_step = 0
        """Optimizer steps that the latest loaded checkpoint had taken."""
        self._inference = InferenceMode()
        self._snapshot: Snapshot | None = None
        self._random_state: dict[str, Any] | None = None  # of a resumed checkpoint, until training starts

    # Set-up

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's tokenizer, loaded at its first use."""
        return self.policy_config.load_tokenizer()

    def setup(self, stage: str) -> None:
        """Refuse strategies and precisions that this module cannot train with."""
        require_strategy(self.trainer)
        require_precision(self.trainer)

    def configure_model(self) -> None:
        """Build and shard the networks; evaluation needs the policy alone."""
        if self.policy is not None:
            return
        self.policy_config.require_vocabulary(self.tokenizer)
        is_training = self._trainer is None or self._trainer.state.fn == TrainerFn.FITTING
        critic = self.critic_config if is_training else None
        is_adapted = self.policy_config.lora is not None  # with LoRA, policy and reference share one model
        self.policy = self.policy_config.build(
            with_value_head=critic is not None and critic.trunk == "shared",
            with_reference=is_adapted and self.has_reference and is_training and not self.base_is_reference,
        )
        self.critic = None if critic is None else critic.build(self.policy_config)
        if self.critic is not None:
            self.critic.require_fit(self.policy)
        if self.has_reference and is_training and not is_adapted:
            self.reference = self.policy_config.build().requires_grad_(False).eval()
        self.branch_off()
        if self.device_mesh is not None:  # ModelParallelStrategy
            for network in self._networks:
                shard(network, self.device_mesh["data_parallel"], sharding_plan(self.trainer))

    def configure_optimizers(self) -> Any:
        """Build the optimizer of the trained parameters, and its schedule over optimizer steps."""
        optimizer = self._build_optimizer()
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": build_scheduler(self._lr_scheduler, optimizer), "interval": "step"},
        }

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

    def branch_off(self) -> None:
        """Start stage EGSPO: copy the policy to the reference policy and to a separate critic's trunk."""
        self.entered_step = self.global_step
        with torch.no_grad():
            if self.critic is not None:
                self.critic.start_from(self._policy)
            assert not self.base_is_reference or lora.changes_nothing(self._policy.lm)
            lora.copy_to_reference(self._policy.lm)
            if self.reference is not None:
                pairs = zip(self.reference.lm.parameters(), self._policy.lm.parameters(), strict=True)
                for frozen, current in pairs:
                    frozen.copy_(current)

    def restart_optimizer(self, learning_rate: float | None) -> None:
        """Clear the optimizer's moments and restart its schedule, from the given or the configured learning rate.

        A critic with its own learning rate keeps it.
        """
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        optimizer.state.clear()
        critic_rate = None if self.critic_config is None else self.critic_config.learning_rate
        for rate, group in zip((learning_rate, critic_rate or learning_rate), optimizer.param_groups, strict=False):
            group.pop("initial_lr", None)
            group["lr"] = optimizer.defaults["lr"] if rate is None else float(rate)
        for config in self.trainer.lr_scheduler_configs:
            assert self._lr_scheduler is not None
            config.scheduler = build_scheduler(self._lr_scheduler, optimizer)

    # Rollouts: sampling and scoring

    @property
    def eos_ids(self) -> list[int]:
        """The tokens that end a completion."""
        return end_of_sequence_ids(self._policy.lm, self.tokenizer)

    @property
    def policy_version(self) -> int:
        """Optimizer steps taken."""
        return self.global_step

    @property
    def is_full_precision(self) -> bool:
        """Whether all computation is in float32."""
        return str(self.trainer.precision) == "32-true" and self.policy_config.dtype == "float32"

    @property
    def takes_sampled_statistics(self) -> bool:
        """Whether to skip ``score`` and use the engine's log-probabilities and entropies.

        This holds in float32 without TF32, where the two differ by rounding alone. A reference policy or a critic must
        score anyway.
        """
        is_exact = self.is_full_precision and torch.get_float32_matmul_precision() == "highest"
        return is_exact and not self.has_reference and self.critic_config is None

    @contextmanager
    def sampling(self) -> Iterator[Any]:
        """The causal language model in eval mode, without gradients, in the precision of training.

        It is re-entrant. With a sharded policy, all ranks must enter it together.
        """
        with self._inferring([self._policy]):
            yield self._policy.lm

    @contextmanager
    def scoring(self) -> Iterator[Any]:
        """The same context as ``sampling``, with reference policy and critic gathered as well."""
        with self._inferring(self._networks):
            yield self._policy.lm

    def _inferring(self, networks: list[Any]) -> AbstractContextManager[None]:
        precision = self.trainer.precision_plugin.forward_context()
        return self._inference.hold(networks, precision, sharding_plan(self.trainer))

    def snapshot(self) -> Snapshot:
        """Copy the policy as it is now, for a sampling thread; overwrites the previous snapshot."""
        if self._snapshot is None:
            self._snapshot = Snapshot(
                self.networks,
                self.tokenizer,
                self.eos_ids,
                self.trainer.precision_plugin.forward_context,
                self.takes_sampled_statistics,
                self.trainer.world_size,
            )
        self._snapshot.refresh(self.networks, self.policy_version)
        return self._snapshot

    def score(self, input_ids: Tensor, completion_mask: Tensor) -> Scores:
        """Score given sequences with the policy and, if present, the reference policy and the critic."""
        with self.scoring():
            return self.networks.score(input_ids.to(self.device), completion_mask.to(self.device))

    # Ranks

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum equally shaped tensors over all ranks."""
        if self.trainer.world_size == 1:
            return values
        return self._all_gather(values.to(self.device)).sum(0)

    def gather_over_ranks(self, values: Tensor) -> Tensor:
        """Concatenate vectors of different lengths over all ranks."""
        if self.trainer.world_size == 1:
            return values
        sizes = self._all_gather(torch.tensor(values.numel(), device=values.device)).tolist()
        padded = torch.nn.functional.pad(values, (0, max(sizes) - values.numel()))
        return torch.cat([row[:size] for row, size in zip(self._all_gather(padded), sizes, strict=True)])

    def collect_over_ranks(self, value: Any) -> list[Any]:
        """Gather one picklable value from each rank, in the order of the ranks."""
        if self.trainer.world_size == 1:
            return [value]
        collected = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(collected, value)
        return collected

    def _all_gather(self, values: Tensor) -> Tensor:
        """(ranks, ...)"""
        gathered = self.all_gather(values)
        assert isinstance(gathered, Tensor)
        return gathered

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the stage, step counters and the random state of each rank.

        Base weights under LoRA are not saved if they reload from the pretrained model.
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
        """Restore the stage, and fit the checkpoint's weights and optimizer states to this run's networks."""
        if "egspo" not in checkpoint:
            raise UserError("ckpt_path: this checkpoint was not written by EGSPOModule.")
        state = checkpoint["egspo"]
        self.stage, self.entered_step = Stage(state["stage"]), state["entered_step"]
        self.loaded_step, self._phase_version = checkpoint["global_step"], state["phase_version"]
        self._previous_version = state["previous_version"]
        is_entry = self.stage == Stage.EGSPO and self.loaded_step == self.entered_step
        is_fit = self.trainer.state.fn == TrainerFn.FITTING  # evaluation needs the policy alone
        if is_fit and self.has_reference and self.policy_config.lora is not None:
            began_with_egspo = self.stage == Stage.EGSPO and self.entered_step == 0
            module_checkpoint.require_same_reference(
                began_with_egspo=began_with_egspo, base_is_reference=self.base_is_reference
            )
        if is_fit and not is_entry:
            self._random_state = module_checkpoint.random_state_of_rank(
                state.get("random", []), self.trainer.global_rank, self.trainer.world_size
            )
        self._fit_weights(checkpoint, is_exact=is_entry or self.stage == Stage.SFT or not is_fit)
        if is_fit and checkpoint.get("optimizer_states"):
            policy, critic = self._trained_parameters()
            optimizer = self._build_optimizer()
            module_checkpoint.fit_optimizer_states(checkpoint, self, [*policy, *critic], optimizer, is_entry=is_entry)

    def _fit_weights(self, checkpoint: dict[str, Any], *, is_exact: bool) -> None:
        weights = checkpoint.get("state_dict", {})
        own = self.state_dict() if weights else {}
        adapt_weights(weights, own, is_exact=is_exact, left_out=self._left_out())
        require_same_shapes(weights, own)
        require_same_tokenizer(checkpoint["egspo"].get("tokenizer"), self._tokenizer_digest)

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
        return module_checkpoint.frozen_under_adapters(self)

    @cached_property
    def _tokenizer_digest(self) -> str:
        return tokenizer_digest(self.tokenizer)  # sorts the whole vocabulary, so cached

    # Networks

    @property
    def networks(self) -> Networks:
        """Policy, reference policy and critic together."""
        return Networks(self._policy, self.reference, self.critic, self.temperature, self.has_reference)

    @property
    def _networks(self) -> list[Any]:
        return [network for network in (self.policy, self.reference, self.critic) if network is not None]

    @property
    def _policy(self) -> Policy:
        assert self.policy is not None, "configure_model has not run"
        return self.policy
