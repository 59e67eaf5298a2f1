"""Prompts to graded completions."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from egspo_lightning.errors import UserError
from egspo_lightning.rewards.functions import Reward, Scored
from egspo_lightning.rollout.engine import Request, RolloutEngine, Sample
from egspo_lightning.rollout.protocol import RolloutPolicy
from egspo_lightning.types import Completion, Problem, Sampling


class Prompt(NamedTuple):
    """A problem, as ids, with the name of its random stream."""

    problem: Problem
    token_ids: list[int]
    seed: str


def complete(
    policy: RolloutPolicy,
    engine: RolloutEngine,
    reward: Reward,
    prompts: Sequence[Prompt],
    num_samples: int,
    sampling: Sampling,
) -> list[Completion]:
    """Sample and grade ``num_samples`` completions a prompt; those of one prompt stand next to one another.

    All ranks must call it equally often, some of them perhaps without prompts.
    """
    requests = [Request(prompt.token_ids, f"{prompt.seed}/{i}") for prompt in prompts for i in range(num_samples)]
    samples: list[Sample] = []
    with policy.sampling() as lm:
        if requests:
            pad_id = policy.tokenizer.pad_token_id
            samples = engine.generate(lm, requests, sampling, eos_ids=policy.eos_ids, pad_id=pad_id)
    problems = [prompt.problem for prompt in prompts for _ in range(num_samples)]
    return grade(policy, reward, problems, samples)


def grade(
    policy: RolloutPolicy, reward: Reward, problems: Sequence[Problem], samples: Sequence[Sample]
) -> list[Completion]:
    """The samples with their texts and verdicts.

    Raises:
        UserError: the reward did not give one finite number a completion.
    """
    if not samples:
        return []
    texts = policy.tokenizer.batch_decode([sample.token_ids for sample in samples], skip_special_tokens=True)
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
            entropies=sample.entropies,
        )
        for problem, sample, text, verdict in zip(problems, samples, texts, scored, strict=True)
    ]


def _require_rewards(scored: Sequence[Scored], count: int, name: str) -> None:
    if len(scored) != count:
        raise UserError(f"data.reward: {name} gave {len(scored)} rewards for {count} completions. One each is needed.")
    for verdict in scored:
        if not math.isfinite(verdict.reward):
            raise UserError(f"data.reward: {name} gave a reward of {verdict.reward}. Rewards must be finite numbers.")
