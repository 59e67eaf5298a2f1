"""The LightningModule: one ``training_step`` for both stages. It handles tensors and never reads text.

One Lightning epoch is one phase: an SFT pass, or one rollout batch with its PPO epochs and minibatches.
Optimization is automatic, so clipping, accumulation, precision, strategies and checkpoints work by flag.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import lazy_instance
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import AdamW, Optimizer

from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.models.policy import Sequences
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.attenuation import Attenuation, ConfidenceAttenuation
from egspo_lightning.ops.diagnostics import Metrics, PhaseMetrics, Reduction
from egspo_lightning.ops.estimators import Advantage, GroupRelative
from egspo_lightning.ops.gate import Gate, QuantileGate
from egspo_lightning.ops.losses import log_ratio
from egspo_lightning.ops.objective import Coefficients, Objective, sft_loss, value_loss
from egspo_lightning.training.adaptive_coefficients import EntropyBonus, KLReward
from egspo_lightning.training.advantage_and_gate import AdvantageAndGate
from egspo_lightning.training.fit_loop import set_epoch_length
from egspo_lightning.training.lazy_defaults import instantiate_lazy_default
from egspo_lightning.training.nonfinite_updates import FiniteUpdates, NonFiniteError, Part, describe, pack
from egspo_lightning.training.policy_module import PolicyModule
from egspo_lightning.training.rollout_checks import first_ratio_gap, require_version
from egspo_lightning.training.setup_rules import require_bounded_passes, require_method
from egspo_lightning.types import (
    ExpertBatch,
    Measurements,
    NetworkOutputs,
    PositiveFloat,
    PositiveInt,
    RolloutBatch,
    ScoredRollouts,
    Stage,
    TrainingBatch,
)


class EGSPOModule(PolicyModule):
    """Trains a policy by SFT, then by EGSPO, in the stage that ``StageTransition`` sets.

    Args:
        policy: The model.
        objective: Hyperparameters of the loss.
        gate: Gives the entropy threshold tau: tokens at or above it take the full update.
        attenuation: Gives the weight phi of the other tokens.
        advantage: Estimates advantages from the rewards of a rollout batch.
        critic: Estimates values; only GAE needs it.
        kl_reward: KL to the reference policy as a part of the reward; none by default.
        entropy_bonus: Term for the policy's entropy in the loss; none by default.
        temperature: Sampling temperature. All log-probabilities of rollouts in training use it.
        optimizer: The optimizer, over all trainable parameters.
        lr_scheduler: Learning-rate schedule over optimizer steps; constant by default.
        initial_stage: sft, or egspo to start with rollouts at once.
        max_bad_updates: Stop after this number of optimizer steps in a row with a non-finite loss or gradient. Each
            step is skipped and counted. At the limit, weights and batch are saved to nonfinite.ckpt, for
            ``egspo replay``.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        objective: Objective = Objective(),  # noqa: B008  frozen, so it can be shared
        gate: Gate = lazy_instance(QuantileGate, top_fraction=0.2),  # noqa: B008
        attenuation: Attenuation = lazy_instance(ConfidenceAttenuation),  # noqa: B008
        advantage: Advantage = lazy_instance(GroupRelative),  # noqa: B008
        critic: CriticConfig | None = None,
        kl_reward: KLReward | None = None,
        entropy_bonus: EntropyBonus | None = None,
        temperature: PositiveFloat = 1.0,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        initial_stage: Literal["sft", "egspo"] = "sft",
        max_bad_updates: PositiveInt = 5,
    ) -> None:
        gate, attenuation = instantiate_lazy_default(gate), instantiate_lazy_default(attenuation)
        advantage = instantiate_lazy_default(advantage)
        has_reference = objective.beta > 0 or kl_reward is not None
        super().__init__(policy, critic, has_reference, temperature, optimizer, lr_scheduler, Stage(initial_stage))
        self.advantage_and_gate = AdvantageAndGate(objective, gate, attenuation, advantage, kl_reward, entropy_bonus)
        self.objective, self.advantage, self.gate, self.attenuation = objective, advantage, gate, attenuation
        self.kl_reward, self.entropy_bonus = kl_reward, entropy_bonus
        require_method(self)
        self._phase = PhaseMetrics()
        self._skip_update = False
        self._finite = FiniteUpdates(int(max_bad_updates))

    @property
    def mixes_expert_data(self) -> bool:
        """Whether optimizer steps on rollouts carry expert demonstrations as well."""
        return self.objective.mixes_expert_data

    @property
    def needs_every_rollout(self) -> bool:
        """Whether rollouts of advantage 0 take part in the loss."""
        return self.objective.needs_every_rollout or self.critic_config is not None or self.entropy_bonus is not None

    # Training

    def on_train_epoch_start(self) -> None:
        """Start a phase. Its rollouts come from the current policy, or from the previous phase's if sampled ahead."""
        self._previous_version, self._phase_version = self._phase_version, self.policy_version
        self._phase.add({"stage": float(self.stage == Stage.EGSPO)})

    def settle_micro_batches(self, number: int, num_updates: int) -> None:
        """Set and log the number of micro-batches of each optimizer step of this phase.

        Raises:
            UserError: no token budget can bound this model's passes.
        """
        require_bounded_passes(self._policy.passes)
        set_epoch_length(self.trainer, number, num_updates)
        self._phase.add({"update/micro_batches": float(number)}, "max")

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Loss of a micro-batch, times ranks and micro-batches, because DDP and Lightning average over them."""
        if batch.stage != self.stage:
            raise RuntimeError(
                f"A batch of stage {batch.stage} came in stage {self.stage}: the loader was not reloaded."
            )
        if batch.stage == Stage.SFT:
            assert batch.expert is not None
            weights = None
            loss, metrics = self._sft_step(batch.expert)
        else:
            assert batch.rollout is not None
            weights = self._coefficients()
            loss, metrics = self._egspo_step(batch.rollout, batch.expert, weights)
        self._finite.note(Part(batch_idx, batch, weights, loss.detach()))
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        self._phase.add({name: value * scale for name, value in (metrics | {"loss/total": loss.detach()}).items()})
        return loss * scale

    def _sft_step(self, expert: ExpertBatch) -> tuple[Tensor, Metrics]:
        self._skip_update = False
        stats = self._policy(expert.input_ids, expert.completion_mask, with_entropies=False)
        loss = sft_loss(stats.logprobs, expert, weighting="plain")
        return loss + self._untouched(stats.values), {"loss/sft": loss.detach()}

    def _egspo_step(
        self, rollout: RolloutBatch, expert: ExpertBatch | None, weights: Coefficients
    ) -> tuple[Tensor, Metrics]:
        self._require_fresh(rollout)
        if weights.mu == 0:
            expert = None  # a schedule of mu may decay to 0
        self._skip_update = rollout.update_size.num_active_tokens == 0 and expert is None
        current, expert_loss = self._egspo_forward(rollout, expert, with_entropies=self._needs_entropies)
        self._check_first_ratio(current.logprobs.detach(), rollout)
        self._phase.add({"policy/mu": weights.mu})
        return self._egspo_loss(current, rollout, expert_loss, weights)

    @property
    def _needs_entropies(self) -> bool:
        """Whether the loss needs entropies of the current policy; the gate normally uses those of sampling."""
        return self.objective.gate_entropy == "current" or self.entropy_bonus is not None

    def _egspo_forward(
        self, rollout: RolloutBatch, expert: ExpertBatch | None, *, with_entropies: bool
    ) -> tuple[NetworkOutputs, Tensor | None]:
        """Network outputs on the rollouts, and the loss on the demonstrations, which share the policy's passes."""
        rows = [Sequences(rollout.input_ids, rollout.completion_mask, self.temperature, with_entropies)]
        if expert is not None:
            rows.append(Sequences(expert.input_ids, expert.completion_mask, with_entropies=False))
        current, *others = self._policy.together(*rows)
        if self.critic is not None:
            current = current._replace(values=self.critic(rollout.input_ids, rollout.completion_mask))
        if expert is None:
            return current, None
        (stats,) = others
        loss = sft_loss(stats.logprobs, expert, weighting=self.objective.expert_weighting)
        return current, loss if stats.values is None else loss + self._untouched(stats.values)

    def _egspo_loss(
        self, current: NetworkOutputs, rollout: RolloutBatch, expert_loss: Tensor | None, weights: Coefficients
    ) -> tuple[Tensor, Metrics]:
        loss, metrics = self.objective.hybrid_loss(current, rollout, self.attenuation, expert_loss, weights)
        if self.critic_config is None or current.values is None:
            return loss, metrics
        error, value_metrics = value_loss(current.values, rollout, clip=self.critic_config.clip)
        return loss + weights.value * error, metrics | value_metrics

    def replay(self, part: Part) -> tuple[Tensor, NetworkOutputs]:
        """Loss of a saved micro-batch, and the network outputs on its tokens, with gradient."""
        rollout, expert, weights = part.batch.rollout, part.batch.expert, part.coefficients
        if rollout is None or weights is None:
            assert expert is not None
            stats = self._policy(expert.input_ids, expert.completion_mask)
            return sft_loss(stats.logprobs, expert, weighting="plain"), stats
        current, expert_loss = self._egspo_forward(rollout, expert if weights.mu > 0 else None, with_entropies=True)
        return self._egspo_loss(current, rollout, expert_loss, weights)[0], current

    def _untouched(self, values: Tensor | None) -> Tensor | float:
        """A zero loss that touches a critic that this step does not train: DDP waits for every gradient."""
        if values is not None:
            return 0.0 * values.sum()
        if self.critic is None or self.device_mesh is not None or self.trainer.world_size == 1:
            return 0.0
        return 0.0 * torch.stack([p.flatten()[0] for p in self.critic.parameters()]).sum()

    def _coefficients(self) -> Coefficients:
        """Weights of the loss terms at this step of stage EGSPO."""
        step = self.global_step - self.entered_step
        critic, bonus = self.critic_config, self.entropy_bonus
        return Coefficients(
            mu=self.objective.mu_at(step),
            policy=0.0 if self._is_warming_up else 1.0,
            value=0.0 if critic is None else critic.coefficient,
            entropy=0.0 if bonus is None else bonus.current,
        )

    @property
    def _is_warming_up(self) -> bool:
        """Whether only the critic is trained so far."""
        critic = self.critic_config
        return critic is not None and self.global_step - self.entered_step < critic.warmup_steps

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Set gradients to None in a skipped step, and those of an untrained network.

        Momentum and weight decay then do not apply either.
        """
        policy, critic = self._trained_parameters()
        scaled = str(self.trainer.precision) == "16-mixed"  # GradScaler skips the step and lowers its scale
        is_bad = self._finite.judge([*policy, *critic], self.sum_over_ranks, scaled=scaled)
        self._phase.add({"fault/nonfinite_updates": float(self._finite.num_bad)}, "max")
        self._skip_update = self._skip_update or is_bad
        self._phase.add({"policy/skipped_fraction": float(self._skip_update)})
        idle = critic if self.stage == Stage.SFT else policy if self._is_warming_up else []
        for parameter in [*policy, *critic] if self._skip_update else idle:
            parameter.grad = None

    def on_train_batch_end(self, outputs: Any, batch: TrainingBatch, batch_idx: int) -> None:
        """Log the phase at its last micro-batch, before callbacks see its end.

        Metrics are logged once a phase because Lightning's ``log`` takes longer than computing them.
        """
        if self._finite.must_stop:
            self._stop_for_bad_updates()
        if not (self.trainer.is_last_batch or self.trainer.fit_loop.epoch_loop.done):
            return
        self.log_phase(self._over_ranks(self._phase.take()))

    def log_phase(self, values: Mapping[str, float]) -> None:
        """Log metrics of a phase, equal on all ranks, after its last optimizer step.

        Lightning would log after the phase's checkpoint is saved. A kill in between would then lose these metrics.
        """
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in self.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, step=self.global_step - 1)

    def _over_ranks(self, metrics: Mapping[Reduction, Metrics]) -> dict[str, float]:
        """Means and maxima over all ranks, in one collective."""
        keys = sorted((reduction, name) for reduction, found in metrics.items() for name in found)
        own = torch.stack([metrics[reduction][name].to(self.device) for reduction, name in keys])
        ranks = own.unsqueeze(0) if self.trainer.world_size == 1 else self._all_gather(own)
        means, maxima = ranks.mean(0).tolist(), ranks.amax(0).tolist()
        both = zip(keys, means, maxima, strict=True)
        return {name: largest if reduction == "max" else mean for (reduction, name), mean, largest in both}

    def _stop_for_bad_updates(self) -> None:
        """Save weights and batch as a checkpoint, and end the run. Collective."""
        part, log_dir = self._finite.bad_part, self.trainer.log_dir
        assert part is not None
        path = Path(log_dir or self.trainer.default_root_dir) / "nonfinite.ckpt"
        self.trainer.save_checkpoint(path, weights_only=False)
        raise NonFiniteError(
            f"{self._finite.num_in_a_row} updates in a row had a loss or gradient that is not finite, the last at "
            f"{describe(part)} after {self.global_step} optimizer steps, phase {self.trainer.current_epoch + 1}. They "
            f"were skipped; the weights are unchanged. To see which tokens: egspo replay {path}. Lower the "
            "learning rate, clip the gradient (trainer.gradient_clip_val), or look at the data, then resume."
        )

    def _require_fresh(self, rollout: RolloutBatch) -> None:
        """Accept rollouts of this phase's policy or, with data.max_staleness 1, of the previous phase's."""
        allowed = {self._phase_version}
        if getattr(self.trainer.datamodule, "max_staleness", 0) > 0:  # type: ignore[attr-defined]
            allowed.add(max(self._previous_version, self.entered_step))  # never from before stage EGSPO
        require_version(rollout.policy_version, allowed, self._phase_version)

    def _check_first_ratio(self, logprobs: Tensor, rollout: RolloutBatch) -> None:
        """Check that every ratio is 1, within the precision in use, before the first optimizer step on a rollout batch.

        The check is skipped for rollouts sampled ahead, because the policy has changed since. The first rollout batch
        of the stage is never sampled ahead, so it is always checked.
        """
        mask = rollout.sampled_mask
        ratios = log_ratio(logprobs, rollout.old_logprobs).masked_fill(~mask, 0.0)
        self._phase.add({"policy/ratio_max": ratios.max().exp()}, "max")
        if self.policy_version == rollout.policy_version:
            is_mean = self.takes_sampled_statistics  # pi_old are then the engine's log-probabilities
            gap = first_ratio_gap(ratios, mask, is_mean=is_mean, is_full_precision=self.is_full_precision)
            self._phase.add({"policy/first_ratio_gap": gap}, "max")

    def to_rollout_batch(self, rollouts: ScoredRollouts, measurements: Measurements) -> RolloutBatch:
        """Add advantages and the gate's threshold to scored rollouts, and keep the metrics of the rollout batch."""
        rollout, metrics = self.advantage_and_gate.to_rollout_batch(rollouts, self)
        metrics["rollout/staleness"] = torch.tensor(float(self.policy_version - rollouts.policy_version))
        pairs = self.sum_over_ranks(torch.tensor(list(measurements.values()), device=self.device))
        counted = zip(measurements, pairs, strict=True)
        self._phase.add(metrics | {name: torch.where(n > 0, total / n, total) for name, (total, n) in counted})
        return rollout

    # Evaluation: the datamodule samples and grades; these hooks only forward its answers

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
        """Also save the state of gate and adaptive coefficients, and the metrics of the phase."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["egspo"]["advantage_and_gate"] = self.advantage_and_gate.state_dict()
        checkpoint["egspo"]["metrics"] = self.collect_over_ranks(self._phase.state_dict())
        checkpoint["egspo"]["finite"] = self._finite.state_dict()
        if self._finite.must_stop and self._finite.bad_part is not None:
            checkpoint["egspo"]["bad_part"] = pack(self._finite.bad_part)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also restore the state of gate and adaptive coefficients, and the metrics of the phase."""
        super().on_load_checkpoint(checkpoint)
        self.advantage_and_gate.load_state_dict(checkpoint["egspo"]["advantage_and_gate"])
        metrics, rank = checkpoint["egspo"]["metrics"], self.trainer.global_rank
        if len(metrics) == self.trainer.world_size:
            self._phase.load_state_dict(metrics[rank])
        if "finite" in checkpoint["egspo"]:
            self._finite.load_state_dict(checkpoint["egspo"]["finite"])
