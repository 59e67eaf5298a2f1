"""Metrics of an optimizer step and of a rollout batch: names and formulas.

Values are detached; those of micro-batches and ranks are parts that add up. Modules that name metrics, by family:

- ``loss/*``: ``ops.objective``, ``module``
- ``gate/*``: ``ops.diagnostics``
- ``policy/*``: ``ops.diagnostics``, ``module``, ``training.advantage_and_gate``, ``training.rollout_checks``
- ``value/*``: ``ops.diagnostics``
- ``rollout/*``: ``rollout.scoring``, ``training.advantage_and_gate``, ``module``
- ``time/*``: ``rollout.scoring``, ``rollout.sampling_ahead``, ``training.advantage_and_gate``
- ``update/*``, ``fault/*``: ``module``
- ``eval/*``: ``evaluation.scores``; ``guard/*``, such as ``guard/unmoved_weights``: ``callbacks.guards``
- ``shift/*``: ``callbacks.probability_shift``

docs/guides/metrics.md explains each one.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from egspo_lightning.ops.gate import high_entropy_mask
from egspo_lightning.ops.losses import clipped_tokens, log_ratio
from egspo_lightning.ops.masking import masked_sum
from egspo_lightning.types import RolloutBatch

Metrics = dict[str, Tensor]
Reduction = Literal["mean", "max"]


class PhaseMetrics:
    """Accumulates the metrics of a phase on the device, so that logging synchronizes once per phase."""

    def __init__(self) -> None:
        self._gathered: dict[Reduction, dict[str, tuple[Tensor, int]]] = {}

    def add(self, metrics: Mapping[str, Tensor | float], reduction: Reduction = "mean") -> None:
        """Add one value of each metric."""
        gathered = self._gathered.setdefault(reduction, {})
        for name, value in metrics.items():
            tensor = torch.as_tensor(value, dtype=torch.float32).detach()
            total, count = gathered.get(name, (None, 0))
            if total is not None:
                tensor = torch.maximum(total, tensor) if reduction == "max" else total + tensor
            gathered[name] = tensor, count + 1

    def take(self) -> dict[Reduction, Metrics]:
        """Means and maxima by name; resets the accumulators."""
        taken: dict[Reduction, Metrics] = {
            reduction: {name: value if reduction == "max" else value / count for name, (value, count) in found.items()}
            for reduction, found in self._gathered.items()
        }
        self._gathered = {}
        return taken

    def state_dict(self) -> dict[str, dict[str, tuple[Tensor, int]]]:
        """Accumulators of an unfinished phase."""
        return {
            reduction: {name: (value.cpu(), count) for name, (value, count) in found.items()}
            for reduction, found in self._gathered.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, tuple[Tensor, int]]]) -> None:
        """Restore the accumulators."""
        self._gathered = {reduction: dict(state.get(reduction, {})) for reduction in get_args(Reduction)}


@torch.no_grad()
def policy_metrics(logprobs: Tensor, rollout: RolloutBatch, clip_low: float, clip_high: float) -> Metrics:
    """Distance from the sampling policy; a token counts as clipped by the given range, whichever branch it takes."""
    old, mask = rollout.old_logprobs, rollout.gated_mask
    below, above = clipped_tokens(logprobs, old, rollout.advantages, clip_low=clip_low, clip_high=clip_high)
    num_tokens = max(rollout.update_size.num_sampled_tokens, 1.0)
    return {
        "policy/approx_kl": masked_sum(-log_ratio(logprobs, old), mask) / num_tokens,
        "policy/clip_fraction_low": masked_sum(below.float(), mask) / num_tokens,
        "policy/clip_fraction_high": masked_sum(above.float(), mask) / num_tokens,
    }


@torch.no_grad()
def value_metrics(values: Tensor, rollout: RolloutBatch, clip: float | None) -> Metrics:
    """Share of values that moved by more than the clip, over the tokens of the optimizer step."""
    assert rollout.old_values is not None
    if clip is None:
        return {}
    moved = ((values - rollout.old_values).abs() > clip).float()
    num_tokens = max(rollout.update_size.num_active_tokens, 1.0)
    return {"value/moved_fraction": masked_sum(moved, rollout.loss_mask) / num_tokens}


@torch.no_grad()
def rollout_batch_sums(rollout: RolloutBatch, weights: Tensor, *, is_by_entropy: bool = True) -> Metrics:
    """Sums over the gated tokens of this rank's rollout batch, to be added over ranks.

    Args:
        rollout: the rollout batch
        weights: g_t, (B, T)
        is_by_entropy: whether the tokens with ``H_t >= tau`` are high, except for ties
    """
    mask = rollout.gated_mask
    high = rollout.is_high & mask
    at_least = high_entropy_mask(rollout.entropies, mask, rollout.threshold)
    has_tokens = mask.any(-1) & torch.isfinite(rollout.threshold.squeeze(1))
    sums = {
        "tokens": mask.sum(),
        "high": high.sum(),
        "left_out": (at_least & ~high).sum() * is_by_entropy,
        "weight": masked_sum(weights, mask),
        "weight_high": masked_sum(weights, high),
        "entropy": masked_sum(rollout.entropies, mask),
        "entropy_high": masked_sum(rollout.entropies, high),
        "rows": has_tokens.sum(),
        "threshold": masked_sum(rollout.threshold.squeeze(1), has_tokens),
    }
    if rollout.returns is not None and rollout.old_values is not None:
        error = rollout.returns - rollout.old_values
        sums |= {
            "value": masked_sum(rollout.old_values, mask),
            "return": masked_sum(rollout.returns, mask),
            "return_squared": masked_sum(rollout.returns.square(), mask),
            "error": masked_sum(error, mask),
            "error_squared": masked_sum(error.square(), mask),
        }
    return {name: value.float() for name, value in sums.items()}


def rollout_batch_metrics(sums: Metrics) -> Metrics:
    """Metrics of gate and critic for a rollout batch, from its ``rollout_batch_sums`` over all ranks.

    A rollout batch whose completions are all masked has no mean.
    """
    if sums["tokens"] == 0:
        return {"gate/weight_sum": sums["weight"]}
    tokens, high = sums["tokens"], sums["high"]
    metrics = {
        "gate/high_fraction": high / tokens,
        "gate/tied_fraction": sums["left_out"] / tokens,
        "gate/weight_mean": sums["weight"] / tokens,
        "gate/weight_sum": sums["weight"],
        "policy/entropy": sums["entropy"] / tokens,
        "policy/entropy_high": sums["entropy_high"] / high.clamp(min=1),
        "policy/entropy_low": (sums["entropy"] - sums["entropy_high"]) / (sums["tokens"] - high).clamp(min=1),
    }
    if sums["weight"] > 0:
        metrics["gate/high_weight_fraction"] = sums["weight_high"] / sums["weight"]
    if sums["rows"] > 0:
        metrics["gate/threshold"] = sums["threshold"] / sums["rows"]
    if "value" in sums:
        unexplained = sums["error_squared"] / tokens - (sums["error"] / tokens).square()
        spread = sums["return_squared"] / tokens - (sums["return"] / tokens).square()
        metrics |= {
            "value/mean": sums["value"] / tokens,
            "value/return_mean": sums["return"] / tokens,
            "value/explained_variance": 1 - unexplained / spread.clamp(min=1e-8),
        }
    return metrics
