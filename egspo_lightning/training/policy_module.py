"""LightningModule of the networks: builds and shards them, and lets rollouts sample and score.

It implements ``rollout.policy_protocol.RolloutPolicy``. ``EGSPOModule`` adds the training step.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from egspo_lightning.models import lora
from egspo_lightning.models.fsdp import shard
from egspo_lightning.models.networks import InferenceMode, Networks
from egspo_lightning.models.policy import Policy, end_of_sequence_ids
from egspo_lightning.models.snapshot import Snapshot
from egspo_lightning.training.fit_loop import begins_run
from egspo_lightning.training.resumable_module import ResumableModule
from egspo_lightning.training.setup_rules import require_separate_passes
from egspo_lightning.training.start_warnings import (
    cpu_quota,
    idle_cores,
    random_weights_warning,
    threads_warning,
    transition_warning,
    warn,
)
from egspo_lightning.training.strategies import require_strategy, sharding_plan
from egspo_lightning.types import NetworkOutputs


class PolicyModule(ResumableModule):
    """Builds the networks of a ``ResumableModule``, and is the policy that rollouts sample and score with."""

    _snapshot: Snapshot | None

    @cached_property
    def _inference(self) -> InferenceMode:
        return InferenceMode()

    # Networks

    def setup(self, stage: str) -> None:
        """Start a run, if this is one. Refuse what this module cannot train with, and warn of likely mistakes."""
        is_fit = stage == TrainerFn.FITTING
        require_strategy(self.trainer)
        if is_fit and self.critic_config is not None:
            self.require_rate_kept("model.critic.learning_rate", self.critic_config.learning_rate, of_critic=True)
        if is_fit and begins_run(self.trainer):
            self.start_run()
        self._warn_of_likely_mistakes(is_fit=is_fit)

    def _warn_of_likely_mistakes(self, *, is_fit: bool) -> None:
        trainer, num_threads = self.trainer, torch.get_num_threads()
        if self.policy is None and trainer.ckpt_path is None:
            warn(random_weights_warning(self.policy_config, is_fit=is_fit))
        if is_fit and trainer.ckpt_path is None:
            warn(transition_warning(trainer.callbacks, self.stage))  # type: ignore[attr-defined]
        if num_threads > 1 and trainer.strategy.root_device.type == "cpu":
            warn(threads_warning(num_threads * trainer.num_devices, cpu_quota(), idle_cores()))

    def start_run(self) -> None:
        """Also drop the policy's snapshot, which holds the precision of its trainer."""
        super().start_run()
        self._snapshot = None

    def configure_model(self) -> None:
        """Build and shard the networks that are missing; a run starts from the policy as it is.

        Evaluation needs the policy alone. A fit after it adds the others.
        """
        trainer, num_built = self._trainer, len(self._networks)
        is_fit = trainer is None or trainer.state.fn == TrainerFn.FITTING
        if self.policy is None:
            self.policy = self._build_policy()
        if is_fit:
            self._add_reference_and_critic()
            data = getattr(trainer, "datamodule", None)
            require_separate_passes(self._networks, getattr(data, "max_staleness", 0))
        if self.device_mesh is not None:  # ModelParallelStrategy
            for network in [network for network in self._networks if not isinstance(network, FSDPModule)]:
                shard(network, self.device_mesh["data_parallel"], sharding_plan(self.trainer))
        if is_fit:
            self._prepare_fit(is_new=len(self._networks) > num_built)

    def _prepare_fit(self, *, is_new: bool) -> None:
        """Put the networks into train mode, and start a run or ``is_new`` networks from the policy as it is."""
        self.train()  # an evaluation that failed leaves eval mode, in which no activation is recomputed
        if self.reference is not None:
            self.reference.eval()
        if is_new or self._trainer is None or begins_run(self._trainer):
            self.start_egspo_stage()

    def _build_policy(self) -> Policy:
        """The policy, with value head and reference adapter if the config has them."""
        self.policy_config.require_vocabulary(self.tokenizer)
        critic, is_adapted = self.critic_config, self.policy_config.lora is not None
        return self.policy_config.build(
            with_value_head=critic is not None and critic.trunk == "shared",
            with_reference=is_adapted and self.has_reference,  # with LoRA, policy and reference share one model
        )

    def _add_reference_and_critic(self) -> None:
        if self.critic is None and self.critic_config is not None and self.critic_config.trunk == "own":
            self.critic = self.critic_config.build(self.policy_config)
            self.critic.require_fit(self._policy)
        if self.reference is None and self.has_reference and self.policy_config.lora is None:
            self.reference = self.policy_config.build().requires_grad_(False)

    def start_egspo_stage(self) -> None:
        """Start stage EGSPO: copy the policy to the reference policy and to a separate critic's trunk."""
        self.egspo_start_step = self.global_step
        with torch.no_grad():
            if self.critic is not None:
                self.critic.start_from(self._policy)
            lora.copy_to_reference(self._policy.lm)
            if self.reference is not None:
                self.reference.lm.load_state_dict(self._policy.lm.state_dict())

    @property
    def networks(self) -> Networks:
        """Policy, reference policy and critic together."""
        return Networks(self._policy, self.reference, self.critic, self.temperature, self.has_reference)

    @property
    def _networks(self) -> list[Any]:
        return [network for network in (self.policy, self.reference, self.critic) if network is not None]

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

    def sampling(self, *, whole: bool = True) -> AbstractContextManager[Any]:
        """The causal language model in eval mode, without gradients, in the precision of training.

        It is re-entrant. With a sharded policy, all ranks must enter it together. ``whole=False`` does not gather the
        shards: the model cannot run then, but an engine can copy its weights.
        """
        return self._inferring([self._policy], whole=whole)

    def scoring(self) -> AbstractContextManager[Any]:
        """The context of ``sampling``, with reference policy and critic gathered as well."""
        return self._inferring(self._networks)

    @contextmanager
    def _inferring(self, networks: list[Any], *, whole: bool = True) -> Iterator[Any]:
        precision = self.trainer.precision_plugin.forward_context()
        with self._inference.hold(networks, precision, sharding_plan(self.trainer), whole=whole):
            yield self._policy.lm

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

    def score(self, input_ids: Tensor, completion_mask: Tensor) -> NetworkOutputs:
        """Score given sequences with the policy and, if present, the reference policy and the critic."""
        with self.scoring():
            return self.networks.score(input_ids.to(self.device), completion_mask.to(self.device))
