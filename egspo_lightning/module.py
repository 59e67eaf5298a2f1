"""The LightningModule: one ``training_step`` for both stages. It handles tensors and never reads text.

One Lightning epoch is one phase: a pass of SFT, or one rollout collection with its PPO epochs and minibatches.
Optimisation is automatic, so clipping, accumulation, precision, strategies and checkpoints work by flag.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from jsonargparse.typing import lazy_instance
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import AdamW, Optimizer

from egspo_lightning.errors import UserError
from egspo_lightning.ops.gate import Attenuation, ConfidenceAttenuation, Gate, QuantileGate
from egspo_lightning.ops.losses import log_ratio
from egspo_lightning.ops.objective import Metrics, Objective, gate_metrics, gate_sums, gate_weights
from egspo_lightning.policy import Policy, PolicyConfig, adapt_reference, end_of_sequence_ids
from egspo_lightning.sharding import gathered, shard
from egspo_lightning.types import ExpertBatch, RolloutBatch, Scores, Stage, TrainingBatch

FULL_PRECISION_TOLERANCE = 1e-3
"""Largest |log(pi / pi_old)| before the first update, nats, where everything is computed in float32."""
LOW_PRECISION_TOLERANCE = 0.5
"""The same in bfloat16 and float16: 4e-2 was seen on sharp models."""


class EGSPOModule(LightningModule):
    """Trains a policy by SFT, then by EGSPO, in the stage that ``StageTransition`` sets.

    Args:
        policy: The model.
        objective: Hyperparameters of the loss.
        gate: Gives the entropy from which a token takes the full update.
        attenuation: Gives the weight of the other tokens.
        temperature: Sampling temperature of the rollouts; old, new and reference log-probabilities are taken at it.
        optimizer: The optimiser, over all trainable parameters.
        lr_scheduler: Learning-rate schedule over optimiser steps; constant by default.
        initial_stage: sft, or egspo to start with rollouts at once.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        objective: Objective = Objective(),  # noqa: B008  frozen, so it can be shared
        gate: Gate = lazy_instance(QuantileGate, top_fraction=0.2),  # noqa: B008
        attenuation: Attenuation = lazy_instance(ConfidenceAttenuation),  # noqa: B008
        temperature: float = 1.0,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        initial_stage: Literal["sft", "egspo"] = "sft",
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"model.temperature must be above 0, got {temperature}: rollouts have to differ.")
        self.policy_config = policy
        self.objective = objective
        self.gate = gate
        self.attenuation = attenuation
        self.temperature = temperature
        self.stage = Stage(initial_stage)
        self.policy: Policy | None = None
        self.reference: Policy | None = None
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._phase_version = self._reference_step = 0
        self._phase_metrics: Metrics = {}
        self._skip_update = self._is_sampling = False

    # Set-up

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's tokenizer, loaded when first asked for."""
        return self.policy_config.load_tokenizer()

    def setup(self, stage: str) -> None:
        """Refuse precisions under which Lightning would round the rollouts' log-probabilities."""
        if str(self.trainer.precision) in ("bf16-true", "16-true"):
            raise UserError(
                f"trainer.precision {self.trainer.precision} rounds old log-probabilities and advantages to half "
                "precision. Use bf16-mixed, or 32-true with model.policy.dtype: bfloat16 for weights in half precision."
            )

    def configure_model(self) -> None:
        """Build the policy and, where beta > 0, room for its reference."""
        if self.policy is not None:
            return
        self.policy = self.policy_config.build()
        if self.objective.beta > 0:
            self.reference = self.policy_config.build().requires_grad_(False).eval()
            self.refresh_reference()
        if self.device_mesh is not None:  # ModelParallelStrategy
            for part in filter(None, (self.policy, self.reference)):
                shard(part, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """The optimiser over what is trained, and its schedule over steps."""
        optimizer = self._optimizer(p for p in self._policy.parameters() if p.requires_grad)
        if self._lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._lr_scheduler(optimizer), "interval": "step"},
        }

    def refresh_reference(self) -> None:
        """Let the policy as it is now be the reference, where there is one."""
        self._reference_step = self.global_step
        if self.reference is not None:
            with torch.no_grad():
                for frozen, current in zip(self.reference.parameters(), self._policy.parameters(), strict=True):
                    frozen.copy_(current)

    def restart_optimizer(self, learning_rate: float | None) -> None:
        """Forget the optimiser's moments, and start its schedule anew from the given or the configured rate."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group.pop("initial_lr", None)
            group["lr"] = optimizer.defaults["lr"] if learning_rate is None else learning_rate
        for config in self.trainer.lr_scheduler_configs:
            assert self._lr_scheduler is not None
            config.scheduler = self._lr_scheduler(optimizer)

    # Training

    def on_train_epoch_start(self) -> None:
        """A phase begins: rollouts of this phase are stamped with the policy as it is now."""
        self._phase_version = self.policy_version
        self._log({"stage": float(self.stage == Stage.EGSPO)})

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """The loss of a micro-batch, scaled so that the mean over micro-batches and ranks is that of the update."""
        if batch.stage != self.stage:
            raise RuntimeError(f"A batch of stage {batch.stage} came in stage {self.stage}: a loader was not renewed.")
        if batch.stage == Stage.SFT:
            assert batch.expert is not None
            loss, metrics = self._sft_step(batch.expert)
        else:
            assert batch.rollout is not None
            loss, metrics = self._egspo_step(batch.rollout, batch.expert)
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        metrics = {name: value * scale for name, value in (metrics | {"loss/total": loss.detach()}).items()}
        self._log(metrics)
        self._log(self._phase_metrics)  # at the first step: callbacks see the end of the phase before the module does
        self._phase_metrics = {}
        return loss * scale

    def _sft_step(self, expert: ExpertBatch) -> tuple[Tensor, Metrics]:
        self._skip_update = False
        loss = self._expert_loss(expert)
        return loss, {"loss/sft": loss.detach()}

    def _egspo_step(self, rollout: RolloutBatch, expert: ExpertBatch | None) -> tuple[Tensor, Metrics]:
        self._refuse_stale(rollout)
        has_gradient = rollout.update_size.num_active_tokens > 0 or expert is not None
        self._skip_update = not has_gradient
        stats = self._policy(rollout.input_ids, rollout.completion_mask, self.temperature)
        self._check_first_ratio(stats.logprobs.detach(), rollout)
        expert_loss = None if expert is None else self._expert_loss(expert)
        return self.objective.hybrid_loss(stats.logprobs, rollout, self.attenuation, expert_loss)

    def _expert_loss(self, expert: ExpertBatch) -> Tensor:
        stats = self._policy(expert.input_ids, expert.completion_mask)
        return self.objective.sft_loss(stats.logprobs, expert)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """An update without any advantage must not move the policy by the optimiser's momentum or weight decay."""
        self._log({"policy/skipped_fraction": float(self._skip_update)})
        if self._skip_update:
            optimizer.zero_grad(set_to_none=True)

    def _log(self, metrics: Mapping[str, Tensor | float], reduce_fx: str = "mean") -> None:
        """Log once a phase, reduced over its micro-batches and over ranks."""
        self.log_dict(dict(metrics), on_step=False, on_epoch=True, sync_dist=True, batch_size=1, reduce_fx=reduce_fx)

    def _refuse_stale(self, rollout: RolloutBatch) -> None:
        if rollout.policy_version != self._phase_version:
            raise RuntimeError(
                f"Stale rollouts: they were sampled by the policy after {rollout.policy_version} optimiser steps, but "
                f"this phase began at {self._phase_version}. A loader that prefetches across phases does this."
            )

    def _check_first_ratio(self, logprobs: Tensor, rollout: RolloutBatch) -> None:
        """Before the first update pi is pi_old, so every ratio must be 1 within the precision in use."""
        ratios = log_ratio(logprobs, rollout.old_logprobs).masked_fill(~rollout.completion_mask, 0.0)
        self._log({"policy/ratio_max": ratios.max().exp()}, reduce_fx="max")
        is_full = str(self.trainer.precision) == "32-true" and self.policy_config.dtype == "float32"
        tolerance = FULL_PRECISION_TOLERANCE if is_full else LOW_PRECISION_TOLERANCE
        if self.policy_version == self._phase_version and not ratios.abs().max() <= tolerance:
            raise RuntimeError(
                f"Before the first update |log(pi / pi_old)| is up to {ratios.abs().max().item():.4f} nats, where at "
                f"most {tolerance} is expected: the scoring and the training forward pass disagree."
            )

    # What rollouts need (rollout.protocol.RolloutPolicy)

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
        """Optimiser steps taken."""
        return self.global_step

    @property
    def mixes_expert_data(self) -> bool:
        """Whether updates on rollouts carry expert demonstrations as well."""
        return self.objective.mu > 0

    @property
    def needs_every_rollout(self) -> bool:
        """Rollouts with advantage 0 enter the loss through the KL alone."""
        return self.objective.beta > 0

    @contextmanager
    def sampling(self) -> Iterator[Any]:
        """The causal language model in eval mode, without gradients, in the precision of training.

        May be entered again within itself. With a sharded policy, all ranks must enter it together.
        """
        policy = self._policy
        if self._is_sampling:
            yield policy.lm
            return
        was_training = policy.training
        policy.eval()  # gradient checkpointing in train mode breaks the cache
        self._is_sampling = True
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(self.trainer.precision_plugin.forward_context())
                for part in filter(None, (policy, self.reference)):
                    stack.enter_context(gathered(part))
                yield policy.lm
        finally:
            self._is_sampling = False
            policy.train(was_training)

    def score(self, input_ids: Tensor, completion_mask: Tensor) -> Scores:
        """Statistics of given sequences under the policy and, where there is one, the reference."""
        input_ids, completion_mask = input_ids.to(self.device), completion_mask.to(self.device)
        with self.sampling():
            stats = self._policy(input_ids, completion_mask, self.temperature)
            if self.reference is None:
                return Scores(stats.logprobs, stats.entropies, None)
            reference = self.reference(input_ids, completion_mask, self.temperature)
            return Scores(stats.logprobs, stats.entropies, reference.logprobs)

    def admit(self, rollout: RolloutBatch, measurements: Any) -> RolloutBatch:
        """Settle tau over the tokens of all ranks, and keep the collection's metrics for the first step to log."""
        entropies = self._gather_over_ranks(rollout.entropies[rollout.completion_mask])
        rollout = rollout._replace(threshold=self.gate.threshold(entropies))
        self._require_weights(rollout)
        sums = gate_sums(rollout, self.attenuation)
        totals = self.sum_over_ranks(torch.stack(list(sums.values())))
        self._phase_metrics = gate_metrics(dict(zip(sums, totals, strict=True)))
        if torch.isfinite(rollout.threshold):
            self._phase_metrics["gate/threshold"] = rollout.threshold
        pairs = self.sum_over_ranks(torch.tensor(list(measurements.values()), device=self.device))
        self._phase_metrics |= {
            name: total / count.clamp(min=1e-9) for name, (total, count) in zip(measurements, pairs, strict=True)
        }
        return rollout

    def _require_weights(self, rollout: RolloutBatch) -> None:
        """Look at what a gate and an attenuation, which may be the user's own, make of a collection."""
        if rollout.threshold.isnan():
            raise UserError(f"model.gate: {type(self.gate).__name__} gave NaN as the threshold.")
        weights = gate_weights(rollout, self.attenuation)[rollout.completion_mask]
        if not (weights >= 0).all():
            raise UserError(
                f"model.attenuation: {type(self.attenuation).__name__} gave a weight below 0 or NaN. phi must be at "
                "least 0: a negative one would turn the update round."
            )

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of equally shaped tensors over all ranks."""
        if self.trainer.world_size == 1:
            return values
        return self._all_gather(values.to(self.device)).sum(0)

    def _gather_over_ranks(self, values: Tensor) -> Tensor:
        """Concatenate vectors of different lengths over all ranks."""
        if self.trainer.world_size == 1:
            return values
        sizes = self._all_gather(torch.tensor(values.numel(), device=values.device)).tolist()
        padded = torch.nn.functional.pad(values, (0, max(sizes) - values.numel()))
        return torch.cat([row[:size] for row, size in zip(self._all_gather(padded), sizes, strict=True)])

    def _all_gather(self, values: Tensor) -> Tensor:
        """(ranks, ...)"""
        gathered = self.all_gather(values)
        assert isinstance(gathered, Tensor)
        return gathered

    # Evaluation: the datamodule samples and grades; what it gives is passed on unread

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Answer a batch of benchmark problems."""
        return {"completions": self._answer(batch)}

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Answer a batch of problems."""
        return self._answer(batch)

    def _answer(self, batch: Any) -> Any:
        return self.trainer.datamodule.answer(batch)  # type: ignore[attr-defined]  # Lightning sets it late

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the stage, and the steps taken at the start of the phase and of the stage."""
        checkpoint["egspo"] = {
            "stage": str(self.stage),
            "phase_version": self._phase_version,
            "reference_step": self._reference_step,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the stage; fit the reference's weights to whether this run has a reference."""
        if "egspo" not in checkpoint:
            raise UserError("ckpt_path: this checkpoint was not written by EGSPOModule.")
        state = checkpoint["egspo"]
        self.stage, self._phase_version = Stage(state["stage"]), state["phase_version"]
        self._reference_step = state["reference_step"]
        is_exact = self.stage == Stage.SFT or checkpoint["global_step"] == self._reference_step
        adapt_reference(checkpoint.get("state_dict", {}), has_reference=self.objective.beta > 0, is_exact=is_exact)

    @property
    def _policy(self) -> Policy:
        assert self.policy is not None, "configure_model has not run"
        return self.policy
