"""Checks of rollouts in a training step: their policy version, and importance ratios of 1 before the first step."""

from collections.abc import Set

from torch import Tensor

from egspo_lightning.ops.diagnostics import Metrics
from egspo_lightning.ops.losses import log_ratio
from egspo_lightning.ops.masking import masked_mean
from egspo_lightning.types import RolloutBatch

FULL_PRECISION_TOLERANCE = 1e-3
"""Largest |log(pi / pi_old)| before the first optimizer step, nats, where all computation is in float32."""
LOW_PRECISION_TOLERANCE = 0.5
"""Largest |log(pi / pi_old)| in bfloat16 and float16: 4e-2 was seen on sharp models."""


def require_version(policy_version: int, allowed: Set[int]) -> None:
    """Refuse rollouts of a policy that is older than ``data.max_staleness`` allows.

    Args:
        policy_version: optimizer steps that the sampling policy had taken
        allowed: the versions that rollouts of this phase may have

    Raises:
        RuntimeError: naming the versions.
    """
    if policy_version not in allowed:
        raise RuntimeError(
            f"Stale rollouts: they were sampled by the policy after {policy_version} optimizer steps. In this phase "
            f"data.max_staleness allows for {' and '.join(map(str, sorted(allowed)))}. A loader that prefetches across "
            "phases does this."
        )


def ratio_metrics(
    logprobs: Tensor, rollout: RolloutBatch, *, is_same_policy: bool, is_mean: bool, is_full_precision: bool
) -> Metrics:
    """Largest importance ratio and, before the first optimizer step, the distance of pi from pi_old, nats.

    Args:
        logprobs: (B, T) under the current policy, detached
        rollout: rollouts of which only the tokens that the policy sampled count
        is_same_policy: whether the policy is still the one that sampled, so that every ratio must be 1
        is_mean: judge the mean, not the largest: single tokens of an engine with a cache may be further off
        is_full_precision: whether all computation is in float32

    Raises:
        RuntimeError: the distance is larger than the precision explains. NaN passes: such a step is skipped later.
    """
    mask = rollout.sampled_mask
    log_ratios = log_ratio(logprobs, rollout.old_logprobs).masked_fill(~mask, 0.0)
    metrics = {"policy/ratio_max": log_ratios.max().exp()}
    if not is_same_policy:
        return metrics
    distance = masked_mean(log_ratios.abs(), mask) if is_mean else log_ratios.abs().max()
    tolerance = FULL_PRECISION_TOLERANCE if is_full_precision else LOW_PRECISION_TOLERANCE
    if distance > tolerance:
        raise RuntimeError(
            f"Before the first update |log(pi / pi_old)| is {distance.item():.4f} nats, where at most {tolerance} "
            "is expected: the training forward pass disagrees with the one that scored the rollouts (in float32, "
            "with the engine that sampled them)."
        )
    return metrics | {"policy/first_ratio_gap": distance}
