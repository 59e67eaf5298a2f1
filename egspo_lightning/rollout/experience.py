"""Problems to experience: sample, grade, score, and turn rewards into advantages."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from egspo_lightning.errors import UserError
from egspo_lightning.ops.advantages import Advantage
from egspo_lightning.ops.padding import pad_right, row_lengths
from egspo_lightning.rewards.functions import Reward, Scored
from egspo_lightning.rollout.engine import Request, RolloutEngine
from egspo_lightning.rollout.protocol import Measurements, RolloutPolicy
from egspo_lightning.types import Completion, Problem, RolloutBatch, Sampling, Scores, UpdateSize

MAX_SAMPLER_GAP = 0.1
"""Mean distance of the engine's log-probabilities from the scorer's, nats a token, that is not a matter of rounding."""

TOKENS_PER_SCORING_BATCH = 16_384
"""Tokens scored in one forward pass, padding included."""


class Prompt(NamedTuple):
    """A problem, as ids, with the name of its random stream."""

    problem: Problem
    token_ids: list[int]
    seed: str


class Collection(NamedTuple):
    """One rollout collection of one rank."""

    completions: list[Completion]
    rollout: RolloutBatch
    measurements: Measurements


def complete(
    policy: RolloutPolicy,
    engine: RolloutEngine,
    reward: Reward,
    prompts: Sequence[Prompt],
    num_samples: int,
    sampling: Sampling,
) -> list[Completion]:
    """Sample and grade ``num_samples`` completions a prompt; those of one prompt stand next to one another."""
    tokenizer = policy.tokenizer
    requests = [Request(prompt.token_ids, f"{prompt.seed}/{i}") for prompt in prompts for i in range(num_samples)]
    with policy.sampling() as lm:
        samples = engine.generate(lm, requests, sampling, eos_ids=policy.eos_ids, pad_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode([sample.token_ids for sample in samples], skip_special_tokens=True)
    problems = [prompt.problem for prompt in prompts for _ in range(num_samples)]
    scored = reward(texts, [problem.answer for problem in problems])
    _require_rewards(scored, len(texts), type(reward).__name__)
    return [
        Completion(
            problem=problem,
            token_ids=sample.token_ids,
            logprobs=sample.logprobs,
            text=text,
            is_truncated=sample.is_truncated,
            reward=verdict.reward,
            correct=verdict.grade.correct,
            extracted=verdict.grade.extracted,
            status=verdict.grade.status,
        )
        for problem, sample, text, verdict in zip(problems, samples, texts, scored, strict=True)
    ]


def collect(
    policy: RolloutPolicy,
    engine: RolloutEngine,
    reward: Reward,
    advantage: Advantage,
    prompts: Sequence[Prompt],
    num_generations: int,
    max_completion_length: int,
) -> Collection:
    """Sample a collection from the policy as it is now, and score it; the gate's threshold is still to be settled.

    A truncated completion is graded as it stands, as any other (as a rule it has no answer), and all its tokens count
    in the loss.

    Raises:
        RuntimeError: the engine did not sample from the policy that the scorer sees.
    """
    version = policy.policy_version
    sampling = Sampling(max_completion_length=max_completion_length, temperature=policy.temperature)
    started = time.perf_counter()
    completions = complete(policy, engine, reward, prompts, num_generations, sampling)
    sampled = time.perf_counter()
    input_ids, mask = _pad(prompts, completions, num_generations, policy.tokenizer.pad_token_id)
    with policy.sampling():
        scores = _score(policy, input_ids, mask)
    device = scores.logprobs.device
    gap = _sampler_gap(completions, scores.logprobs[mask.to(device)])
    rewards = torch.tensor([completion.reward for completion in completions])
    advantages = advantage.estimate(rewards, num_generations).to(device)
    rollout = RolloutBatch(
        input_ids=input_ids.to(device),
        completion_mask=mask.to(device),
        old_logprobs=scores.logprobs,
        entropies=scores.entropies,
        ref_logprobs=scores.ref_logprobs,
        advantages=advantages.unsqueeze(1) * mask.to(device),
        rewards=rewards.to(device),
        threshold=torch.full((), torch.inf, device=device),
        policy_version=version,
        update_size=UpdateSize(0, 0, max_completion_length, 0),
    )
    seconds = {"time/sample_and_grade": sampled - started, "time/score": time.perf_counter() - sampled}
    measurements = {**measure(completions, num_generations, seconds), "rollout/sampler_gap": gap}
    return Collection(completions, rollout, measurements)


def _require_rewards(scored: Sequence[Scored], count: int, name: str) -> None:
    if len(scored) != count:
        raise UserError(f"data.reward: {name} gave {len(scored)} rewards for {count} completions. One each is needed.")
    for verdict in scored:
        if not math.isfinite(verdict.reward):
            raise UserError(f"data.reward: {name} gave a reward of {verdict.reward}. Rewards must be finite numbers.")


def _sampler_gap(completions: Sequence[Completion], scored: Tensor) -> tuple[float, float]:
    """Distance between the engine's and the scorer's log-probabilities, as (sum, tokens)."""
    sampled = torch.tensor([value for completion in completions for value in completion.logprobs])
    gap = (sampled - scored.cpu().float()).abs()
    if not gap.mean() <= MAX_SAMPLER_GAP:
        raise RuntimeError(
            f"The engine's log-probabilities are {gap.mean():.3f} nats a token from the scorer's, where at most "
            f"{MAX_SAMPLER_GAP} is expected: it samples from another distribution (stale weights, a cache or a mask "
            "that this architecture does not support)."
        )
    return gap.sum().item(), gap.numel()


def measure(completions: Sequence[Completion], num_generations: int, seconds: dict[str, float]) -> Measurements:
    """What the rollouts were like, as (sum, count) by metric name."""
    rewards = torch.tensor([completion.reward for completion in completions])
    groups = rewards.view(-1, num_generations)
    flat = int((groups.amax(-1) == groups.amin(-1)).sum())
    std = groups.std(-1).sum().item() if num_generations > 1 else 0.0
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    count = len(completions)
    return {
        "rollout/reward_mean": (rewards.sum().item(), count),
        "rollout/reward_std": (std, len(groups)),
        "rollout/accuracy": (sum(completion.correct for completion in completions), count),
        "rollout/zero_spread_fraction": (flat, len(groups)),
        "rollout/length_mean": (num_tokens, count),
        "rollout/truncated_fraction": (sum(completion.is_truncated for completion in completions), count),
        "rollout/grader_timeouts": (sum(completion.status == "timeout" for completion in completions), 1),
        "rollout/grader_crashes": (sum(completion.status == "crashed" for completion in completions), 1),
        "rollout/tokens_per_second": (num_tokens, seconds["time/sample_and_grade"]),
    } | {name: (value, 1) for name, value in seconds.items()}


def _pad(
    prompts: Sequence[Prompt], completions: Sequence[Completion], num_generations: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Sequences padded on the right, and the mask of their completions; both (B, T)."""
    pairs = [
        (prompts[i // num_generations].token_ids, completion.token_ids) for i, completion in enumerate(completions)
    ]
    return pad_right(pairs, pad_id)


def _score(policy: RolloutPolicy, input_ids: Tensor, mask: Tensor) -> Scores:
    """Score in batches of like length, bounded in tokens."""
    lengths = row_lengths(mask)
    order = lengths.argsort()
    parts: list[tuple[Tensor, Scores]] = []
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * int(lengths[order[end]]) <= TOKENS_PER_SCORING_BATCH:
            end += 1
        rows = order[start:end]
        width = max(int(lengths[rows[-1]]), 2)
        parts.append((rows, policy.score(input_ids[rows, :width], mask[rows, :width])))
        start = end
    references = [(rows, scores.ref_logprobs) for rows, scores in parts if scores.ref_logprobs is not None]
    return Scores(
        _scatter([(rows, scores.logprobs) for rows, scores in parts], mask.shape),
        _scatter([(rows, scores.entropies) for rows, scores in parts], mask.shape),
        _scatter(references, mask.shape) if references else None,
    )


def _scatter(parts: list[tuple[Tensor, Tensor]], shape: torch.Size) -> Tensor:
    whole = parts[0][1].new_zeros(shape)
    for rows, values in parts:
        whole[rows.to(values.device), : values.shape[1]] = values
    return whole
