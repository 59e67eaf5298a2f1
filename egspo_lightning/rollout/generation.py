"""Generation: samples and grades completions of prompts."""

from collections.abc import Iterator, Sequence

from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.extraction import THINK_MARKS, with_opened_block
from egspo_lightning.rewards.functions import Details, Reward
from egspo_lightning.rollout.engine import Request, RolloutEngine, Sample
from egspo_lightning.rollout.overlapped_grading import OverlappedGrading
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
        return grade(policy, composed, [owners[i] for i in numbers], samples, sampling.max_completion_length)

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


def decode(policy: RolloutPolicy, samples: Sequence[Sample]) -> list[str]:
    """Texts of samples without special tokens, except think marks, which some tokenizers declare special."""
    added = policy.tokenizer.added_tokens_decoder.items()
    dropped = {number for number, token in added if token.special and token.content not in THINK_MARKS}
    kept = [[token for token in s.token_ids if token not in dropped] for s in samples]
    texts: list[str] = policy.tokenizer.batch_decode(kept, skip_special_tokens=False)
    return texts


def grade(
    policy: RolloutPolicy,
    reward: WeightedReward,
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    max_completion_length: int,
) -> list[Completion]:
    """Grade samples, one for each prompt: add texts, verdicts and rewards.

    Raises:
        UserError: the reward did not give one finite number for each completion.
    """
    if not samples:
        return []
    texts = decode(policy, samples)
    asked = prompt_texts(policy, prompts)
    golds = [prompt.problem.answer for prompt in prompts]
    judged = [with_opened_block(text, prompt) for text, prompt in zip(texts, asked, strict=True)]
    grades = reward.grader.grade(judged, golds)
    details = [
        Details(prompt.problem, text, len(sample.token_ids), max_completion_length, sample.is_truncated, verdict)
        for prompt, text, sample, verdict in zip(prompts, asked, samples, grades, strict=True)
    ]
    scored = reward.score(texts, golds, details)
    return [
        Completion(
            problem=detail.problem,
            token_ids=sample.token_ids,
            logprobs=sample.logprobs,
            text=text,
            is_truncated=sample.is_truncated,
            reward=result.reward,
            correct=detail.grade.correct,
            extracted=detail.grade.extracted,
            status=detail.grade.status,
            reward_terms=result.terms,
            entropies=sample.entropies,
        )
        for sample, text, detail, result in zip(samples, texts, details, scored, strict=True)
    ]


def prompt_texts(policy: RolloutPolicy, prompts: Sequence[Prompt]) -> list[str]:
    """Texts of prompts with special tokens, since a think mark may be one; each distinct prompt is decoded once."""
    distinct = {tuple(prompt.token_ids): prompt.token_ids for prompt in prompts}
    texts = policy.tokenizer.batch_decode(list(distinct.values()), skip_special_tokens=False)
    by_ids = dict(zip(distinct, texts, strict=True))
    return [by_ids[tuple(prompt.token_ids)] for prompt in prompts]
