"""The LightningModule: one ``training_step`` for both stages. It handles tensors and never reads text.

One Lightning epoch is one phase: an SFT pass, or one rollout batch with its PPO epochs and minibatches.
Optimization is automatic, so clipping, accumulation, precision, strategies and checkpoints work by flag.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from jsonargparse.typing import lazy_instance
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import AdamW, Optimizer

from egspo_lightning.models.batched_forward import Sequences
from egspo_lightning.models.critic import CriticConfig
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.attenuation import Attenuation, ConfidenceAttenuation
from egspo_lightning.ops.diagnostics import Metrics, PhaseMetrics
from egspo_lightning.ops.entropy_gate import EntropyGate
from egspo_lightning.ops.estimators import Advantage, GroupRelative
from egspo_lightning.ops.gate import Gate, QuantileGate
from egspo_lightning.ops.objective import Coefficients, Objective, sft_loss, value_loss
from egspo_lightning.ops.token_methods import Surrogate, TokenMethod, TokenWeights
from egspo_lightning.ops.token_view import Statistics
from egspo_lightning.training.adaptive_coefficients import EntropyBonus, KLReward
from egspo_lightning.training.advantage_and_gate import AdvantageAndGate
from egspo_lightning.training.fit_loop import set_epoch_length
from egspo_lightning.training.lazy_defaults import instantiate_lazy_default
from egspo_lightning.training.method_rules import require_method
from egspo_lightning.training.nonfinite_updates import FiniteUpdates, RecordedMicroBatch
from egspo_lightning.training.policy_module import PolicyModule
from egspo_lightning.training.rollout_checks import ratio_metrics, require_version
from egspo_lightning.training.setup_rules import require_bounded_passes
from egspo_lightning.training.suppressed_warnings import silence_noise
from egspo_lightning.training.trainer import log_folder
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

    ``fit`` of a new trainer starts a run: it continues the weights, and all else begins as in a new module. Another
    ``fit`` of the same trainer continues its run.

    Args:
        policy: The model.
        objective: Hyperparameters of the loss.
        gate: Gives the entropy threshold tau: tokens at or above it take the full update.
        attenuation: Gives the weight phi of the other tokens.
        token_weights: Weights of the tokens in the surrogate; null is EntropyGate with the gate and attenuation above.
        surrogate: Policy loss of a token; null is PPO's, with the clip of the objective.
        advantage: Estimates advantages from the rewards of a rollout batch.
        critic: Estimates values; only GAE needs it.
        kl_reward: KL to the reference policy as a part of the reward; none by default.
        entropy_bonus: Term for the policy's entropy in the loss; none by default.
        temperature: Sampling temperature. All log-probabilities of rollouts in training use it.
        optimizer: The optimizer, over all trainable parameters.
        lr_scheduler: Learning-rate schedule over optimizer steps; constant by default.
        initial_stage: The stage in which each run starts: sft, or egspo to start with rollouts at once.
        method: Name of the method, which is the label of stage EGSPO on the screen.
        max_bad_updates: Stop after this number of optimizer steps in a row with a non-finite loss or gradient. Each
            such step is skipped and counted. At the limit, weights and batch are saved to nonfinite.ckpt, for
            ``egspo replay``.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        objective: Objective = Objective(),  # noqa: B008  frozen, so it can be shared
        gate: Gate = lazy_instance(QuantileGate, top_fraction=0.2),  # noqa: B008
        attenuation: Attenuation = lazy_instance(ConfidenceAttenuation),  # noqa: B008
        token_weights: TokenWeights | None = None,
        surrogate: Surrogate | None = None,
        advantage: Advantage = lazy_instance(GroupRelative),  # noqa: B008
        critic: CriticConfig | None = None,
        kl_reward: KLReward | None = None,
        entropy_bonus: EntropyBonus | None = None,
        temperature: PositiveFloat = 1.0,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        initial_stage: Literal["sft", "egspo"] = "sft",
        method: str = "egspo",
        max_bad_updates: PositiveInt = 5,
    ) -> None:
        silence_noise()
        gate, attenuation = instantiate_lazy_default(gate), instantiate_lazy_default(attenuation)
        advantage = instantiate_lazy_default(advantage)
        has_reference = objective.beta > 0 or kl_reward is not None
        super().__init__(policy, critic, has_reference, temperature, optimizer, lr_scheduler, Stage(initial_stage))
        self.gate, self.attenuation, self.surrogate = gate, attenuation, surrogate
        self.token_weights = self._with_gate(EntropyGate() if token_weights is None else token_weights)
        self.objective, self.advantage = objective, advantage
        self.advantage_and_gate = AdvantageAndGate(objective, self.token_weights, advantage, kl_reward, entropy_bonus)
        self.kl_reward, self.entropy_bonus, self.method = kl_reward, entropy_bonus, method
        self.max_bad_updates = int(max_bad_updates)
        require_method(self)
        self._initial_parts = copy.deepcopy(self.advantage_and_gate.state_dict())
        self.start_run()

    def _with_gate(self, token_weights: TokenWeights) -> TokenWeights:
        """An ``EntropyGate`` takes the parts that it lacks from model.gate and model.attenuation."""
        if not isinstance(token_weights, EntropyGate):
            return token_weights
        return replace(
            token_weights,
            gate=self.gate if token_weights.gate is None else token_weights.gate,
            attenuation=self.attenuation if token_weights.attenuation is None else token_weights.attenuation,
        )

    def start_run(self) -> None:
        """Also start gate and adaptive coefficients, metrics and counts of bad steps anew."""
        super().start_run()
        self.advantage_and_gate.load_state_dict(copy.deepcopy(self._initial_parts))
        self._phase, self._skip_update, self._finite = PhaseMetrics(), False, FiniteUpdates(self.max_bad_updates)

    @property
    def stage_label(self) -> str:
        """The stage as the user reads it: sft, or the name of the method."""
        return str(self.stage) if self.stage == Stage.SFT else self.method

    @property
    def mixes_expert_data(self) -> bool:
        """Whether optimizer steps on rollouts carry expert demonstrations as well."""
        return self.objective.mixes_expert_data

    @property
    def needs_every_rollout(self) -> bool:
        """Whether rollouts of advantage 0 take part in the loss."""
        parts = (self.objective, self.token_method)
        has_own_loss = self.critic_config is not None or self.entropy_bonus is not None
        return has_own_loss or any(part.needs_every_rollout for part in parts)

    @property
    def token_method(self) -> TokenMethod:
        """Token weights and surrogate, with statistics over the ranks of the run."""
        has_trainer = self._trainer is not None  # replay has none
        ranks = Statistics(self.sum_over_ranks, self.gather_over_ranks) if has_trainer else Statistics()
        return TokenMethod(self.token_weights, self.surrogate, ranks)

    # Training

    def on_train_epoch_start(self) -> None:
        """Start a phase. Its rollouts come from the current policy, or from the previous phase's if sampled ahead."""
        self.previous_version, self.phase_version = self.phase_version, self.policy_version
        self._phase.add({"stage": float(self.stage == Stage.EGSPO)})

    def set_num_micro_batches(self, number: int, num_steps: int) -> None:
        """Set and log the number of micro-batches of each of this phase's ``num_steps`` optimizer steps.

        Raises:
            UserError: no token budget can bound this model's passes.
        """
        require_bounded_passes(self._policy.passes)
        set_epoch_length(self.trainer, number, num_steps)
        self._phase.add({"update/micro_batches": float(number)}, "max")

    def add_advantages_and_gate(self, rollouts: ScoredRollouts, measurements: Measurements) -> RolloutBatch:
        """Add advantages and the gate's threshold to scored rollouts, and keep the metrics of the rollout batch."""
        rollout, metrics = self.advantage_and_gate.apply(rollouts, self)
        metrics["rollout/staleness"] = torch.tensor(float(self.policy_version - rollouts.policy_version))
        pairs = self.sum_over_ranks(torch.tensor(list(measurements.values()), device=self.device))
        counted = zip(measurements, pairs, strict=True)
        self._phase.add(metrics | {name: torch.where(n > 0, total / n, total) for name, (total, n) in counted})
        return rollout

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Loss of a micro-batch, times the numbers of ranks and micro-batches: DDP and Lightning average over them."""
        assert batch.stage == self.stage, "the loader was not reloaded"
        weights = None
        if batch.rollout is None:
            assert batch.expert is not None
            loss, metrics = self._sft_step(batch.expert)
        else:
            weights = self._coefficients()
            if weights.mu == 0:
                batch = batch._replace(expert=None)  # a schedule of mu may decay to 0
            loss, metrics = self._egspo_step(batch, weights)
        self._finite.micro_batches.append(RecordedMicroBatch(batch_idx, batch, weights, loss.detach()))
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        self._phase.add({name: value * scale for name, value in (metrics | {"loss/total": loss.detach()}).items()})
        return loss * scale

    def _sft_step(self, expert: ExpertBatch) -> tuple[Tensor, Metrics]:
        self._skip_update = False
        loss, current = self._sft_loss(expert, with_entropies=False)
        return loss + self._zero_critic_loss(current.values), {"loss/sft": loss.detach()}

    def _egspo_step(self, batch: TrainingBatch, weights: Coefficients) -> tuple[Tensor, Metrics]:
        rollout, expert = batch.rollout, batch.expert
        assert rollout is not None
        require_version(rollout.policy_version, self._allowed_versions)
        self._skip_update = rollout.update_size.num_active_tokens == 0 and expert is None
        uses_entropies = self.token_method.needs_current_entropies or self.entropy_bonus is not None
        loss, metrics, current = self._hybrid_loss(rollout, expert, weights, with_entropies=uses_entropies)
        ratios = ratio_metrics(
            current.logprobs.detach(),
            rollout,
            is_same_policy=self.policy_version == rollout.policy_version,  # not if the rollouts were sampled ahead
            is_mean=self.takes_sampled_statistics,  # pi_old are then the engine's log-probabilities
            is_full_precision=self.is_full_precision,
        )
        self._phase.add(ratios, "max")
        self._phase.add({"policy/mu": weights.mu})
        return loss, metrics

    @property
    def _allowed_versions(self) -> set[int]:
        """Policy versions of this phase's rollouts: its own or, with data.max_staleness 1, the previous phase's too."""
        if getattr(self.trainer.datamodule, "max_staleness", 0) == 0:  # type: ignore[attr-defined]
            return {self.phase_version}
        return {self.phase_version, max(self.previous_version, self.egspo_start_step)}  # never a version from stage SFT

    # Losses

    def _sft_loss(self, expert: ExpertBatch, *, with_entropies: bool) -> tuple[Tensor, NetworkOutputs]:
        current = self._policy(expert.input_ids, expert.completion_mask, with_entropies=with_entropies)
        return sft_loss(current.logprobs, expert, weighting=self.objective.sft_weighting), current

    def _hybrid_loss(
        self, rollout: RolloutBatch, expert: ExpertBatch | None, weights: Coefficients, *, with_entropies: bool
    ) -> tuple[Tensor, Metrics, NetworkOutputs]:
        """L, metrics, and network outputs on the rollouts; demonstrations share the policy's passes with them."""
        rows = [Sequences(rollout.input_ids, rollout.completion_mask, self.temperature, with_entropies)]
        if expert is not None:
            uses_entropies = self.objective.expert_weighting == "srft"
            rows.append(Sequences(expert.input_ids, expert.completion_mask, with_entropies=uses_entropies))
        current, *others = self._policy.together(*rows)
        expert_loss = None
        if expert is not None:
            weighting, entropies = self.objective.expert_weighting, others[0].entropies
            expert_loss = sft_loss(others[0].logprobs, expert, weighting=weighting, entropies=entropies)
            if others[0].values is not None:
                expert_loss = expert_loss + self._zero_critic_loss(others[0].values)
        if self.critic is not None:
            current = current._replace(values=self.critic(rollout.input_ids, rollout.completion_mask))
        loss, metrics = self.objective.hybrid_loss(current, rollout, self.token_method, expert_loss, weights)
        if self.critic_config is not None and current.values is not None:
            error, value_metrics = value_loss(current.values, rollout, clip=self.critic_config.clip)
            loss, metrics = loss + weights.value * error, metrics | value_metrics
        return loss, metrics, current

    def _zero_critic_loss(self, values: Tensor | None) -> Tensor | float:
        """A loss of 0 over every critic parameter: DDP waits for each gradient, and this batch trains none of them.

        ``values`` are those of a value head on the policy, if there is one.
        """
        if values is not None:
            return 0.0 * values.sum()
        if self.critic is None or self.device_mesh is not None or self.trainer.world_size == 1:
            return 0.0
        return 0.0 * torch.stack([p.flatten()[0] for p in self.critic.parameters()]).sum()

    def replay(self, recorded: RecordedMicroBatch) -> tuple[Tensor, NetworkOutputs]:
        """Loss of a saved micro-batch, and the network outputs on its tokens, with gradient."""
        rollout, expert, weights = recorded.batch.rollout, recorded.batch.expert, recorded.coefficients
        if rollout is None or weights is None:
            assert expert is not None
            return self._sft_loss(expert, with_entropies=True)
        loss, _, current = self._hybrid_loss(rollout, expert, weights, with_entropies=True)
        return loss, current

    def _coefficients(self) -> Coefficients:
        """Weights of the loss terms at this step of stage EGSPO."""
        critic, bonus = self.critic_config, self.entropy_bonus
        return Coefficients(
            mu=self.objective.mu_at(self.global_step - self.egspo_start_step),
            policy=0.0 if self._is_warming_up else 1.0,
            value=0.0 if critic is None else float(critic.coefficient),
            entropy=0.0 if bonus is None else bonus.current,
        )

    @property
    def _is_warming_up(self) -> bool:
        """Whether only the critic is trained so far."""
        critic = self.critic_config
        return critic is not None and self.global_step - self.egspo_start_step < critic.warmup_steps

    # Optimizer steps

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skip a step with bad gradients or without tokens: set all gradients to None, so that momentum rests too.

        In other steps the gradients of a network that is not trained now are set to None.
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
        """Log the phase at its last micro-batch, before the callbacks' ``on_train_epoch_end``.

        Metrics are logged once a phase because Lightning's ``log`` takes longer than computing them.
        """
        if self._finite.must_stop:
            path = log_folder(self.trainer) / "nonfinite.ckpt"
            self.trainer.save_checkpoint(path, weights_only=False)
            raise self._finite.error(path, self.global_step, self.current_epoch + 1)
        if self.trainer.is_last_batch or self.trainer.fit_loop.epoch_loop.done:
            self.log_phase(self.reduce_over_ranks(self._phase.take()))

    def log_phase(self, values: Mapping[str, float]) -> None:
        """Log metrics of a phase, equal on all ranks, after its last optimizer step.

        Lightning would log after the phase's checkpoint is saved. A kill in between would then lose these metrics.
        """
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for logger in self.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, step=self.global_step - 1)

    def trained_logprobs(self, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
        """Log-probabilities by the passes of an optimizer step with expert data: two batches, in train mode."""
        halves = zip(input_ids.tensor_split(2), completion_mask.tensor_split(2), strict=True)
        parts = [Sequences(ids, mask, self.temperature, with_entropies=False) for ids, mask in halves]
        with self.sampling():
            self._policy.train()  # the outermost context restores the mode
            return torch.cat([outputs.logprobs for outputs in self._policy.together(*parts)])

    # Evaluation: the datamodule samples and grades; these hooks only forward its answers

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Answer a batch of benchmark problems."""
        return {"completions": self.predict_step(batch, batch_idx)}

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Answer a batch of problems."""
        return self.trainer.datamodule.answer(batch)  # type: ignore[attr-defined]  # Lightning sets it late

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also save the state of gate and adaptive coefficients, and the metrics of the phase."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["egspo"] |= {
            "advantage_and_gate": self.advantage_and_gate.state_dict(),
            "metrics": self.collect_over_ranks(self._phase.state_dict()),
            "finite": self._finite.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also restore the state of gate and adaptive coefficients, and the metrics of the phase."""
        super().on_load_checkpoint(checkpoint)
        state, rank = checkpoint["egspo"], self.trainer.global_rank
        self.advantage_and_gate.load_state_dict(state["advantage_and_gate"])
        self._finite.load_state_dict(state["finite"])
        if len(state["metrics"]) == self.trainer.world_size:
            self._phase.load_state_dict(state["metrics"][rank])
