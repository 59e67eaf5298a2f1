"""Advantages and token weights of a rollout batch: from scored rollouts to a batch that is ready for training.

It runs once for each rollout batch, before its first optimizer step, over the tokens of all ranks.
"""

import time
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from egspo_lightning.errors import UserError
from egspo_lightning.ops.correction import is_corrected, sampler_ratios
from egspo_lightning.ops.diagnostics import Metrics, rollout_batch_metrics, rollout_batch_sums
from egspo_lightning.ops.entropy_gate import EntropyGate
from egspo_lightning.ops.estimators import Advantage, Estimate, estimate_credit, reward_kl
from egspo_lightning.ops.masking import masked_sum, require_shape
from egspo_lightning.ops.objective import Objective
from egspo_lightning.ops.part_states import States, restore, states_of
from egspo_lightning.ops.token_methods import WEIGHT_RANGE, TokenWeights, are_sound, branches_of
from egspo_lightning.ops.token_view import Statistics, view_of
from egspo_lightning.training.adaptive_coefficients import EntropyBonus, KLReward
from egspo_lightning.training.collectives import Collectives
from egspo_lightning.types import NetworkOutputs, RolloutBatch, ScoredRollouts, UpdateSize


@dataclass(frozen=True)
class AdvantageAndGate:
    """KL penalty, advantages, token weights and entropy coefficient, applied in this order to each rollout batch."""

    objective: Objective
    token_weights: TokenWeights
    advantage: Advantage
    kl_reward: KLReward | None
    entropy_bonus: EntropyBonus | None

    def apply(self, rollouts: ScoredRollouts, ranks: Collectives) -> tuple[RolloutBatch, Metrics]:
        """This rank's rollout batch, ready for training, and metrics over all ranks. Collective."""
        penalty, metrics = self._penalize_kl(rollouts, ranks)
        rollout = self._credit(rollouts, penalty, ranks)
        started = time.perf_counter()
        rollout, weights = self._add_token_weights(rollout, ranks)
        metrics["time/gate"] = torch.tensor(time.perf_counter() - started)
        sums = rollout_batch_sums(rollout, weights, is_by_entropy=self._is_by_entropy)
        summed = ranks.sum_over_ranks(torch.stack(list(sums.values())))
        totals = dict(zip(sums, summed, strict=True))
        metrics |= rollout_batch_metrics(totals) | self._sampler_metrics(rollout, ranks)
        if self.entropy_bonus is not None:
            if totals["tokens"] > 0:  # no tokens, no entropy
                self.entropy_bonus.update(metrics["policy/entropy"].item())
            metrics["policy/entropy_coefficient"] = torch.tensor(self.entropy_bonus.current)
        return rollout, metrics

    @property
    def _is_by_entropy(self) -> bool:
        """Whether the tokens with ``H_t >= tau`` are high, except for ties."""
        return bool(getattr(getattr(self.token_weights, "gate", None), "by_entropy", True))

    def _penalize_kl(self, rollouts: ScoredRollouts, ranks: Collectives) -> tuple[Tensor | None, Metrics]:
        """``coefficient KL_t`` (B, T), and metrics; then adapts the coefficient to the mean KL."""
        control = self.kl_reward
        if control is None:
            return None, {}
        kl = reward_kl(rollouts, control.estimator)
        mask = rollouts.completion_mask[: rollouts.num_sampled]
        counts = torch.stack([kl[: rollouts.num_sampled].sum(), mask.sum().float(), mask.any(-1).sum().float()])
        total, num_tokens, num_completions = ranks.sum_over_ranks(counts).tolist()
        mean, used = total / max(num_tokens, 1.0), control.current
        control.update(mean, int(num_completions))
        return used * kl, {"rollout/kl": torch.tensor(mean), "rollout/kl_coefficient": torch.tensor(used)}

    def _credit(self, rollouts: ScoredRollouts, penalty: Tensor | None, ranks: Collectives) -> RolloutBatch:
        """The rollout batch with advantages and returns, all its token weights 1."""
        estimate = estimate_credit(rollouts, self.advantage, penalty=penalty, total=ranks.sum_over_ranks)
        self._require_estimate(estimate, rollouts, ranks)
        mask, scores = rollouts.completion_mask, rollouts.scores
        is_masked = rollouts.is_truncated & self.objective.mask_truncated
        rows = torch.arange(mask.shape[0], device=mask.device)
        return RolloutBatch(
            input_ids=rollouts.input_ids,
            completion_mask=mask,
            old_logprobs=scores.logprobs,
            entropies=scores.entropies,
            ref_logprobs=scores.ref_logprobs if self.objective.beta > 0 else None,
            old_values=scores.values,
            advantages=torch.where(mask & ~is_masked.unsqueeze(1), estimate.advantages, 0.0),
            returns=estimate.returns,
            rewards=rollouts.rewards,
            is_expert=rows >= rollouts.num_sampled,
            is_masked=is_masked,
            is_truncated=rollouts.is_truncated,
            groups=rollouts.problem_numbers,
            members=self._members(rollouts),
            threshold=scores.entropies.new_full((len(rows), 1), -torch.inf),
            is_high=mask,
            high_weights=torch.ones_like(scores.entropies),
            low_weights=torch.zeros_like(scores.entropies),
            weight_scale=scores.entropies.new_ones(len(rows), 1),
            policy_version=rollouts.policy_version,
            update_size=UpdateSize(0, 0, float(rollouts.max_length), 0, 0),
            sampled_logprobs=rollouts.sampled_logprobs,
            number=rollouts.number,
        )

    @staticmethod
    def _members(rollouts: ScoredRollouts) -> Tensor:
        """(B,) number of each row in its group; an expert solution comes after the G completions."""
        size, num_experts = rollouts.group_size, len(rollouts.expert_groups)
        own = torch.arange(rollouts.num_sampled, device=rollouts.rewards.device) % size
        return torch.cat([own, own.new_full((num_experts,), size)])

    def _sampler_metrics(self, rollout: RolloutBatch, ranks: Collectives) -> Metrics:
        """Ratios of pi_old to the engine's distribution over all ranks; none if the engine gave pi_old itself.

        Ratios are by token or by sequence, as ``sampler_correction.level`` says, even if its mode is off.
        """
        sampled, correction = rollout.sampled_logprobs, self.objective.sampler_correction
        if sampled is None:
            return {}
        mask = rollout.gated_mask
        ratios = sampler_ratios(rollout.old_logprobs, sampled, mask, level=correction.level)[mask]
        corrected = is_corrected(ratios, mode=correction.mode, cap=correction.cap)
        largest = torch.cat([ratios, ratios.new_zeros(1)]).max()
        sums = torch.stack([ratios.sum(), corrected.sum().float(), mask.sum().float()])
        total, num_corrected, num_tokens = ranks.sum_over_ranks(sums)
        return {
            "policy/sampler_ratio_mean": total / num_tokens.clamp(min=1),
            "policy/sampler_ratio_max": ranks.gather_over_ranks(largest.reshape(1)).max(),
            "policy/sampler_corrected_fraction": num_corrected / num_tokens.clamp(min=1),
        }

    def _require_estimate(self, estimate: Estimate, rollouts: ScoredRollouts, ranks: Collectives) -> None:
        """Check the output of an estimator, which may be the user's own. Collective."""
        name, mask = f"model.advantage: {type(self.advantage).__name__}", rollouts.completion_mask
        tensors = [estimate.advantages, *([estimate.returns] if self.advantage.needs_values else [])]
        for tensor in tensors:
            require_shape(tensor, mask, f"{name} must give advantages, and returns for a critic,")
        is_finite = torch.stack([tensor[mask].isfinite().all() for tensor in tensors if tensor is not None]).all()
        _require_on_all(ranks, is_finite, f"{name} gave advantages or returns that are infinite or NaN.")

    def _add_token_weights(self, rollout: RolloutBatch, ranks: Collectives) -> tuple[RolloutBatch, Tensor]:
        """The rollout batch with its token weights, and g_t, (B, T), scaled. Collective."""
        over_ranks = Statistics(ranks.sum_over_ranks, ranks.gather_over_ranks)
        scored = NetworkOutputs(rollout.old_logprobs, rollout.entropies)
        branches = branches_of(self.token_weights, view_of(rollout, scored, over_ranks, threshold=None))
        mask, weights = rollout.gated_mask, branches.high + branches.low
        self._require_sound(branches.threshold, weights[mask], ranks)
        scale = rollout.weight_scale
        if self.objective.rescale_weights:
            total, count = ranks.sum_over_ranks(torch.stack([masked_sum(weights, mask), mask.sum().float()]))
            scale = scale * torch.where(total > 0, count / total, 1.0)
        rollout = rollout._replace(
            threshold=branches.threshold.reshape(-1, 1).expand_as(rollout.threshold),
            is_high=branches.is_high,
            high_weights=branches.high,
            low_weights=branches.low,
            weight_scale=scale,
        )
        return rollout, weights * scale

    def _require_sound(self, tau: Tensor, weights: Tensor, ranks: Collectives) -> None:
        """Check the output of gate, attenuation or token weights, which may be the user's own. Collective."""
        parts = {name: type(getattr(self.token_weights, name, None)).__name__ for name in ("gate", "attenuation")}
        source = f"model.token_weights: {type(self.token_weights).__name__}"
        if isinstance(self.token_weights, EntropyGate):
            source = f"model.attenuation: {parts['attenuation']}"
        _require_on_all(ranks, ~tau.isnan().any(), f"model.gate: {parts['gate']} gave NaN as the threshold.")
        _require_on_all(
            ranks,
            are_sound(weights),
            f"{source} gave a weight below 0, infinite or NaN. {WEIGHT_RANGE}",
        )

    # Checkpoints

    @property
    def _parts(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def state_dict(self) -> States:
        """State that its parts keep between rollout batches."""
        return states_of(self._parts)

    def load_state_dict(self, state: States) -> None:
        """Restore the state; see ``ops.part_states.restore``."""
        restore(self._parts, state)


def _require_on_all(ranks: Collectives, holds: Tensor, message: str) -> None:
    if ranks.sum_over_ranks((~holds).float()) > 0:
        raise UserError(message)
