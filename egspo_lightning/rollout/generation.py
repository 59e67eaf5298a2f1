"""Generation: samples completions of prompts, and has them graded (`grade_rollouts`) at the same time."""

from collections.abc import Iterator, Sequence

from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.functions import Reward
from egspo_lightning.rollout.engine import Request, RolloutEngine, Sample
from egspo_lightning.rollout.grade_rollouts import OverlappedGrading, grade_rollouts
from egspo_lightning.rollout.policy_protocol import RolloutPolicy
from egspo_lightning.rollout.rollout_records import Prompt
from egspo_lightning.types import Completion, Sampling


def sample_and_grade(
    policy: RolloutPolicy,
    engine: RolloutEngine,
    reward: Reward,
    prompts: Sequence[Prompt],
    num_samples: int,
    sampling: Sampling,
) -> tuple[list[Completion], float]:
    """Sample and grade ``num_samples`` completions of each prompt, while sampling and grading overlap. Collective.

    All ranks must call it equally often, with or without prompts.

    Returns:
        The completions, those of a prompt adjacent, and the seconds spent waiting for grades once sampling had ended.

    Raises:
        UserError: the reward did not give one finite number for each completion.
    """
    owners = [prompt for prompt in prompts for _ in range(num_samples)]
    composed = WeightedReward.of(reward)

    def grade_some(numbers: Sequence[int], samples: Sequence[Sample]) -> list[Completion]:
        return grade_rollouts(policy, composed, [owners[i] for i in numbers], samples, sampling.max_completion_length)

    with OverlappedGrading(grade_some, len(owners), num_samples, cancel=composed.grader.close) as grading:
        for batch in _stream(policy, engine, prompts, num_samples, sampling):
            grading.add(batch)
        return grading.finish(), grading.seconds_waited


def sample(
    policy: RolloutPolicy, engine: RolloutEngine, prompts: Sequence[Prompt], num_samples: int, sampling: Sampling
) -> list[Sample]:
    """Sample ``num_samples`` completions of each prompt; those of a prompt are adjacent. Collective.

    Statistics, which take 64 bytes a token, are left out.

    All ranks must call it equally often, with or without prompts.
    """
    batches = _stream(policy, engine, prompts, num_samples, sampling)
    done = {i: found._replace(logprobs=[], entropies=None) for batch in batches for i, found in batch}
    return [done[i] for i in range(len(prompts) * num_samples)]


def _stream(
    policy: RolloutPolicy, engine: RolloutEngine, prompts: Sequence[Prompt], num_samples: int, sampling: Sampling
) -> Iterator[list[tuple[int, Sample]]]:
    """Yield batches of (request number, sample) within the policy's sampling context."""
    requests = [Request(prompt.token_ids, f"{prompt.seed}/{i}") for prompt in prompts for i in range(num_samples)]
    with policy.sampling() as lm:
        if requests:
            pad_id = policy.tokenizer.pad_token_id
            yield from engine.stream(lm, requests, sampling, eos_ids=policy.eos_ids, pad_id=pad_id)
