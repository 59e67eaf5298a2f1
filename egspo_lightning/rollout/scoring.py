"""Scoring: log-probabilities, entropies and values of sampled groups, and the metrics of a rollout batch."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from egspo_lightning.ops.batching import batches_within, pad_right, row_lengths
from egspo_lightning.rollout.policy_protocol import RolloutPolicy
from egspo_lightning.rollout.rollout_records import Group, SampledGroups
from egspo_lightning.types import Completion, Measurements, NetworkOutputs, ScoredRollouts

MAX_SAMPLER_GAP = 0.1
"""Largest mean distance between the log-probabilities of engine and scorer that rounding explains, nats a token."""

TOKENS_PER_SCORING_BATCH = 16_384
"""Token budget of a forward pass that scores, padding included."""


def score(policy: RolloutPolicy, sampled: SampledGroups, max_length: int) -> tuple[ScoredRollouts, Measurements]:
    """Score sampled groups with the networks as they are now, or take the engine's statistics if they are as good.

    Collective. If nothing is scored, the module's check of the first ratio still compares sampler and trainer.

    Raises:
        RuntimeError: the engine did not sample from the policy that the scorer sees.
    """
    started = time.perf_counter()
    rows = completions_by_row(sampled.groups)
    groups = [group for group in sampled.groups for _ in group.completions]
    groups += [group for group in sampled.groups if group.expert is not None]
    pairs = [(group.prompt.token_ids, row.token_ids) for group, row in zip(groups, rows, strict=True)]
    input_ids, mask = pad_right(pairs, policy.tokenizer.pad_token_id)
    with policy.scoring() as lm:
        known = None if sampled.has_experts else _sampled_scores(policy, rows, mask, next(lm.parameters()).device)
        scores = known or _score(policy, input_ids, mask)
    device = scores.logprobs.device
    experts = [i for i, group in enumerate(sampled.groups) if group.expert is not None]
    rollouts = ScoredRollouts(
        input_ids=input_ids.to(device),
        completion_mask=mask.to(device),
        scores=scores,
        rewards=torch.tensor([row.reward for row in rows], dtype=torch.float32, device=device),
        is_truncated=torch.tensor([row.is_truncated for row in rows], device=device),
        group_size=len(sampled.groups[0].completions),
        expert_groups=torch.tensor(experts, dtype=torch.long, device=device),
        problem_numbers=torch.tensor([group.number for group in groups], device=device),
        max_length=max_length,
        policy_version=policy.policy_version,
    )
    gap = {}
    if known is None:
        rollouts = rollouts._replace(sampled_logprobs=_sampled_logprobs(rows, rollouts))
        gap["rollout/sampler_gap"] = _sampler_gap(rollouts)
    seconds = {"time/score": (time.perf_counter() - started, 1.0)}
    return rollouts, {**measure(sampled), **seconds, **gap}


def completions_by_row(groups: Sequence[Group]) -> list[Completion]:
    """Completions in the order of the rows: the policy's, then the experts'."""
    experts = [group.expert for group in groups if group.expert is not None]
    return [completion for group in groups for completion in group.completions] + experts


def _sampled_logprobs(rows: Sequence[Completion], rollouts: ScoredRollouts) -> Tensor:
    """Log-probabilities from the engine, (B, T); NaN where they are not finite, and on expert rows."""
    mask = rollouts.completion_mask
    values = _spread((row.logprobs for row in rows), mask.cpu()).to(mask.device)
    values[rollouts.num_sampled :] = torch.nan
    return torch.where(values.isfinite(), values, torch.nan)


def _sampler_gap(rollouts: ScoredRollouts) -> tuple[float, float]:
    """Distance between the log-probabilities of engine and scorer, as (sum, tokens).

    The limit holds with every sampler correction: a correction for stale weights would be noise.

    Raises:
        RuntimeError: the mean distance exceeds ``MAX_SAMPLER_GAP``.
    """
    assert rollouts.sampled_logprobs is not None
    is_known = rollouts.completion_mask & ~rollouts.sampled_logprobs.isnan()
    gap = (rollouts.sampled_logprobs - rollouts.scores.logprobs)[is_known].abs()
    if gap.numel() and not gap.mean() <= MAX_SAMPLER_GAP:
        raise RuntimeError(
            f"The engine's log-probabilities are {gap.mean():.3f} nats a token from the scorer's, where at most "
            f"{MAX_SAMPLER_GAP} is expected: it samples from another distribution (stale weights, a cache or a mask "
            "that this architecture does not support)."
        )
    return gap.sum().item(), gap.numel()


def measure(sampled: SampledGroups) -> Measurements:
    """Metrics of sampled groups, as (sum, count) by name.

    They include discarded groups, or the policy would look better than it is. Only ``rollout/flat_groups`` leaves them
    out.
    """
    groups = [*sampled.groups, *sampled.discarded]
    completions = [completion for group in groups for completion in group.completions]
    statuses = Counter(completion.status for completion in completions)
    rewards = torch.tensor([float(completion.reward) for completion in completions]).view(len(groups), -1)
    std = rewards.std(-1).sum().item() if rewards.shape[1] > 1 else 0.0
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    count = len(completions)
    return {
        "rollout/reward_mean": (rewards.sum().item(), count),
        "rollout/reward_std": (std, len(groups)),
        "rollout/accuracy": (sum(completion.correct for completion in completions), count),
        "rollout/zero_spread_fraction": (sum(group.is_flat for group in groups), len(groups)),
        "rollout/flat_groups": (sum(group.is_flat and group.expert is None for group in sampled.groups), 0),
        "rollout/resampled_groups": (len(sampled.discarded), 0),
        "rollout/length_mean": (num_tokens, count),
        "rollout/truncated_fraction": (sum(completion.is_truncated for completion in completions), count),
        "rollout/grader_timeouts": (statuses["timeout"], 0),
        "rollout/grader_crashes": (statuses["crashed"], 0),
        "rollout/tokens_per_second": (num_tokens, sampled.seconds),
        "time/sample": (sampled.seconds - sampled.seconds_grading, 1),
        "time/grade": (sampled.seconds_grading, 1),
    } | {
        f"rollout/reward/{name}": (sum(completion.reward_terms[name] for completion in completions), count)
        for name in completions[0].reward_terms
    }


def _sampled_scores(
    policy: RolloutPolicy, rows: Sequence[Completion], mask: Tensor, device: torch.device
) -> NetworkOutputs | None:
    """Scores from the engine's statistics, (B, T); None where the networks must score.

    The decision must be the same on all ranks, because they add up their metrics.
    """
    entropies = [row.entropies for row in rows if row.entropies is not None]
    if not policy.takes_sampled_statistics or len(entropies) < len(rows):
        return None
    logprobs = _spread((row.logprobs for row in rows), mask)
    return NetworkOutputs(logprobs.to(device), _spread(entropies, mask).to(device))


def _spread(values: Iterable[list[float]], mask: Tensor) -> Tensor:
    """Put the values of all rows, in order, where a mask on the CPU is true, (B, T) float32."""
    flat = torch.tensor([value for row in values for value in row], dtype=torch.float32)
    return torch.zeros(mask.shape).masked_scatter(mask, flat)


def _score(policy: RolloutPolicy, input_ids: Tensor, mask: Tensor) -> NetworkOutputs:
    """Score in batches of rows of similar length, within the token budget."""
    lengths = row_lengths(mask)
    order = lengths.argsort()
    parts: list[tuple[Tensor, NetworkOutputs]] = []
    for places in batches_within(lengths[order].tolist(), TOKENS_PER_SCORING_BATCH, padded=True):
        rows = order[places]
        width = max(int(lengths[rows[-1]]), 2)
        parts.append((rows, policy.score(input_ids[rows, :width], mask[rows, :width])))
    whole = {name: value.new_zeros(mask.shape) for name, value in parts[0][1]._asdict().items() if value is not None}
    for rows, scores in parts:
        for name, values in whole.items():
            part = getattr(scores, name)
            values[rows.to(part.device), : part.shape[1]] = part
    return NetworkOutputs(**whole)
