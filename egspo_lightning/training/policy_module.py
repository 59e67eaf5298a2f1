"""The networks of a run as a LightningModule, and what rollouts ask of them (``rollout.protocol.RolloutPolicy``).

How they are saved is ``ResumableModule``'s, and how they are trained ``EGSPOModule``'s; how they are held, sharded,
sampled from and scored stands here.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from egspo_lightning.errors import UserError
from egspo_lightning.models import lora
from egspo_lightning.models.critic import Critic, CriticConfig
from egspo_lightning.models.fsdp import gathered, shard
from egspo_lightning.models.networks import Networks
from egspo_lightning.models.policy import Policy, Sequences, end_of_sequence_ids
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.models.snapshot import Snapshot
from egspo_lightning.training.optimizers import build_optimizer, build_scheduler
from egspo_lightning.training.strategies import require_strategy, sharding_plan
from egspo_lightning.types import ExpertBatch, NetworkOutputs, RolloutBatch, Scores, Stage


class PolicyModule(LightningModule):
    """Policy, reference and critic: built, sharded, optimized, sampled from and scored.

    Args:
        policy: The model.
        critic: What estimates values; None has no critic.
        has_reference: Whether to keep the policy as stage EGSPO began beside the one in training.
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
        temperature: float,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        stage: Stage,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError(f"model.temperature must be above 0, got {temperature}: rollouts have to differ.")
        self.policy_config, self.critic_config, self.has_reference = policy, critic, has_reference
        self.base_is_reference = has_reference and policy.lora is not None and stage == Stage.EGSPO
        """Whether the reference is the model without its adapter: what the policy is where EGSPO begins without SFT."""
        self.temperature = temperature
        self.stage = stage
        self.policy: Policy | None = None
        self.reference: Policy | None = None
        self.critic: Critic | None = None
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._phase_version = 0
        self.entered_step = 0
        """Optimizer steps taken when stage EGSPO was entered."""
        self._whole: list[Any] = []  # the networks that are held for inference
        self._staleness = 0  # collections that rollouts may be behind
        self._previous_version = 0  # optimizer steps at the start of the phase before this one
        self._snapshot: Snapshot | None = None

    # Set-up

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's tokenizer, loaded when first asked for."""
        return self.policy_config.load_tokenizer()

    def setup(self, stage: str) -> None:
        """Refuse strategies that cannot be had, and precisions that would round the rollouts' log-probabilities."""
        require_strategy(self.trainer)
        if str(self.trainer.precision) in ("bf16-true", "16-true"):
            raise UserError(
                f"trainer.precision {self.trainer.precision} rounds old log-probabilities and advantages to half "
                "precision. Use bf16-mixed, or 32-true with model.policy.dtype: bfloat16 for weights in half precision."
            )

    def configure_model(self) -> None:
        """Build the networks; to measure a policy, it alone is enough."""
        if self.policy is not None:
            return
        self.policy_config.require_vocabulary(self.tokenizer)
        is_training = self._trainer is None or self._trainer.state.fn == TrainerFn.FITTING
        critic = self.critic_config if is_training else None
        is_adapted = self.policy_config.lora is not None  # the reference is then the policy's own model
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
        """The optimizer over what is trained, and its schedule over steps."""
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
        """Of the policy, and of the critic."""
        heads = [part for part in (self._policy.value_head, self.critic) if part is not None]
        critic = [p for part in heads for p in part.parameters() if p.requires_grad]
        return [p for p in self._policy.lm.parameters() if p.requires_grad], critic

    def branch_off(self) -> None:
        """Let the reference, and the trunk of a critic of its own, be the policy as it is now: EGSPO starts here."""
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
        """Forget the optimizer's moments, and start its schedule anew from the given or the configured rate.

        A critic with a rate of its own keeps it.
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

    # What rollouts need

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model was made for, in tokens; None where its config does not say."""
        return getattr(self._policy.lm.config, "max_position_embeddings", None)

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
        """Whether everything is computed in float32."""
        return str(self.trainer.precision) == "32-true" and self.policy_config.dtype == "float32"

    @property
    def takes_sampled_statistics(self) -> bool:
        """Whether what the engine says of its tokens can stand for ``score``: in float32 they differ by rounding alone.

        A reference or a critic has to be asked in any case, and products in reduced precision (TF32) are not float32.
        """
        is_exact = self.is_full_precision and torch.get_float32_matmul_precision() == "highest"
        return is_exact and not self.has_reference and self.critic_config is None

    @contextmanager
    def sampling(self) -> Iterator[Any]:
        """The causal language model in eval mode, without gradients, in the precision of training.

        May be entered again within itself. With a sharded policy, all ranks must enter it together.
        """
        with self._inferring([self._policy]):
            yield self._policy.lm

    @contextmanager
    def scoring(self) -> Iterator[Any]:
        """The same, with reference and critic gathered as well."""
        with self._inferring(self._networks):
            yield self._policy.lm

    @contextmanager
    def _inferring(self, networks: list[Any]) -> Iterator[None]:
        """Hold networks whole and in eval mode; those that already are stay as they are."""
        fresh = [network for network in networks if network not in self._whole]
        was_training = [network.training for network in fresh]
        for network in fresh:
            network.eval()  # gradient checkpointing in train mode breaks the cache
        self._whole += fresh
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(self.trainer.precision_plugin.forward_context())
                for network in fresh:
                    stack.enter_context(gathered(network, sharding_plan(self.trainer)))
                yield
        finally:
            for network, training in zip(fresh, was_training, strict=True):
                self._whole.remove(network)
                network.train(training)

    def accept_staleness(self, num_rollout_batches: int) -> None:
        """Train on rollouts of the policy of so many phases ago as well.

        Raises:
            UserError: the policy is sharded.
        """
        if num_rollout_batches > 0 and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise UserError(
                f"data.max_staleness = {num_rollout_batches} samples from a copy of the policy while it trains, and "
                "under trainer.strategy fsdp2 each rank holds a shard of it alone: two threads would gather weights "
                "and reduce gradients at the same time, in no order that ranks agree on. Set max_staleness to 0, or "
                "trainer.strategy to ddp."
            )
        self._staleness = num_rollout_batches

    def snapshot(self) -> Snapshot:
        """The policy as it is now, for a thread; the one before is overwritten."""
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
        """Statistics of given sequences under the policy and, where there are such, the reference and the critic."""
        with self.scoring():
            return self.networks.score(input_ids.to(self.device), completion_mask.to(self.device))

    def statistics(self, rollout: RolloutBatch, *, with_entropies: bool) -> NetworkOutputs:
        """What policy and critic say of rollouts, at the sampling temperature, with gradient where it is on."""
        ids, mask = rollout.input_ids, rollout.completion_mask
        return self.networks.statistics(ids, mask, with_entropies=with_entropies)

    def statistics_beside(
        self, rollout: RolloutBatch, expert: ExpertBatch, *, with_entropies: bool
    ) -> tuple[NetworkOutputs, NetworkOutputs]:
        """The same, and log-probabilities of experts' solutions at temperature 1, in shared passes."""
        ids, mask = rollout.input_ids, rollout.completion_mask
        expert_rows = Sequences(expert.input_ids, expert.completion_mask, with_entropies=False)
        return self.networks.statistics_beside(ids, mask, expert_rows, with_entropies=with_entropies)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of equally shaped tensors over all ranks."""
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
        """The value of each rank, in their order: anything that can be pickled, for checkpoints."""
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

    # Its networks

    @property
    def networks(self) -> Networks:
        """Policy, reference and critic together."""
        return Networks(self._policy, self.reference, self.critic, self.temperature, self.has_reference)

    @property
    def _networks(self) -> list[Any]:
        return [network for network in (self.policy, self.reference, self.critic) if network is not None]

    @property
    def _policy(self) -> Policy:
        assert self.policy is not None, "configure_model has not run"
        return self.policy
