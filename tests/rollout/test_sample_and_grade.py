"""Prompts to graded completions with the real model, tokenizer and grader."""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from egspo_lightning.data.decoding import decode
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.format import FormatReward
from egspo_lightning.rewards.functions import CorrectnessReward, Details
from egspo_lightning.rewards.length import SoftLengthPenalty
from egspo_lightning.rewards.workers import Grade
from egspo_lightning.rollout.engine import Request, Sample, sample
from egspo_lightning.rollout.grade_rollouts import grade_rollouts, sample_and_grade
from egspo_lightning.rollout.rollout_records import Prompt
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import Problem, Sampling

LIMIT = 30


class SmallPolicy:
    """A policy with random weights and the methods that rollouts need."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.eos_ids = [self.tokenizer.eos_token_id]

    @contextmanager
    def sampling(self, *, whole=True):
        with torch.no_grad():
            yield self.lm


class Scripted:
    """An engine that returns the given texts in batches."""

    def __init__(self, policy, texts, batch_size, before_each=lambda start: None):
        self.tokenizer, self.texts, self.batch_size = policy.tokenizer, texts, batch_size
        self.before_each = before_each

    def stream(self, lm, requests, sampling, *, eos_ids, pad_id):
        assert len(requests) == len(self.texts)
        for start in range(0, len(self.texts), self.batch_size):
            self.before_each(start)
            rows = [self.tokenizer.encode(text) + eos_ids for text in self.texts[start : start + self.batch_size]]
            yield [(start + i, Sample(row, False, [0.0] * len(row))) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def policy(small_model):
    return SmallPolicy(small_model)


@pytest.fixture
def reward():
    terms = {
        "correctness": CorrectnessReward(num_workers=2, deadline_s=1.0),
        "format": FormatReward(),
        "length": SoftLengthPenalty(20),
    }
    reward = WeightedReward(terms, {"format": 0.1, "length": 0.5})
    yield reward
    reward.close()


def prompts(policy, *golds, text="1+1=?"):
    return [
        Prompt(Problem(str(i), text, gold), policy.tokenizer.encode(text * (i + 1)), f"seed/{i}")
        for i, gold in enumerate(golds)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 11, 12])
def test_sampling_and_grading_in_batches_equals_one_by_one(policy, reward, batch_size):
    """Compared with samples that are drawn one by one and graded together."""
    asked, sampling = prompts(policy, "2", "4", "6"), Sampling(LIMIT)
    found, _ = sample_and_grade(policy, TransformersEngine(batch_size), reward, asked, 4, sampling)
    requests = [(prompt, f"{prompt.seed}/{i}") for prompt in asked for i in range(4)]
    alone = {"eos_ids": policy.eos_ids, "pad_id": policy.tokenizer.pad_token_id}
    with policy.sampling() as lm:
        samples = [
            TransformersEngine().generate(lm, [Request(prompt.token_ids, seed)], sampling, **alone)[0]
            for prompt, seed in requests
        ]
    expected = grade_rollouts(policy, reward, [prompt for prompt, _ in requests], samples, LIMIT)
    assert len({tuple(completion.token_ids) for completion in expected}) == 12
    assert len({completion.reward for completion in expected}) > 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours._replace(logprobs=theirs.logprobs, entropies=theirs.entropies) == theirs
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert ours.entropies == pytest.approx(theirs.entropies, abs=1e-4)


TEXTS = [
    r"\boxed{x+1}",
    r"\boxed{1+x} or \boxed{x}",
    r"\boxed{\sqrt{2}}",
    r"\boxed{2^{1/2}}",
    r"\boxed{2^{9999999999999999}}",
    "none",
]
GOLDS = ["1+x", r"\sqrt{2}", "7"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_verdicts_and_rewards_do_not_depend_on_batch_size(policy, reward, batch_size):
    """With the real grader, algebraic answers, and an answer that times out or is wrong."""
    found, _ = sample_and_grade(
        policy, Scripted(policy, TEXTS, batch_size), reward, prompts(policy, *GOLDS), 2, Sampling(LIMIT)
    )
    assert [completion.text for completion in found] == TEXTS
    assert [completion.correct for completion in found] == [True, False, True, True, False, False]
    assert [completion.extracted for completion in found] == [
        "x+1", "1+x, x", r"\sqrt{2}", "2^{1/2}", "2^{9999999999999999}", None,
    ]  # fmt: skip
    # bytes and an EOS: 12, 25, 17, 16, 29, 5 tokens of 30, the last 20 of which cost 1/20 each
    assert [len(completion.token_ids) for completion in found] == [12, 25, 17, 16, 29, 5]
    terms = [(1, 1, -0.1), (0, 0, -0.75), (1, 1, -0.35), (1, 1, -0.3), (0, 1, -0.95), (0, 0, 0)]
    for completion, (correct, form, length) in zip(found, terms, strict=True):
        assert completion.reward_terms == pytest.approx({"correctness": correct, "format": form, "length": length})
        assert completion.reward == pytest.approx(correct + 0.1 * form + 0.5 * length)
    one, _ = sample_and_grade(policy, Scripted(policy, TEXTS, 6), reward, prompts(policy, *GOLDS), 2, Sampling(LIMIT))
    assert found == one


def test_reward_receives_details(policy):
    seen = []

    def watch(completions, golds, details=()):
        seen.extend(zip(completions, golds, details, strict=True))
        return [0.0] * len(completions)

    asked = prompts(policy, "2", text="Q")
    sample = Sample(policy.tokenizer.encode(r"\boxed{2}"), True, [0.0] * 9)
    (completion,) = grade_rollouts(policy, WeightedReward.of(watch), asked, [sample], 9)
    verdict = Grade(True, "graded", "2", 0.0)
    assert seen == [(r"\boxed{2}", "2", Details(asked[0].problem, "Q", 9, 9, True, verdict))]
    assert completion.correct  # the grader's verdict, independent of the reward
    assert completion.reward == 0.0


@pytest.mark.parametrize(
    ("prompt", "completion", "correct"),
    [
        ("Q <think>\n", r"so \boxed{2}, but wait", False),
        ("Q <think>\n", r"hm</think> \boxed{2}", True),
        ("Q", r"so \boxed{2}, but wait", True),
        ("Q", r"[THINK]so \boxed{2}, but wait", False),
        ("Q<|channel|>analysis<|message|>", r"so \boxed{2}<|channel|>final<|message|>\boxed{3}", False),
    ],
    ids=["never closed", "closed", "none", "opened by itself", "channels"],
)
def test_boxed_text_inside_an_open_think_block_is_not_graded(policy, reward, prompt, completion, correct):
    asked = prompts(policy, "2", text=prompt)
    (found,) = grade_rollouts(
        policy, reward, asked, [Sample(policy.tokenizer.encode(completion), False, [0.0] * 40)], LIMIT
    )
    assert found.correct == correct
    assert found.text == completion


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (("<think>", "3", "</think>", "<other>", r"\boxed{2}"), r"<think>3</think>\boxed{2}"),
        (
            ("<|channel|>", "analysis", "<|message|>", "3", "<|end|>", "<|channel|>", "final", "<|message|>", "2"),
            "<|channel|>analysis<|message|>3<|channel|>final<|message|>2",
        ),
    ],
)
def test_decode_keeps_think_marks_that_are_special_tokens(repository, pieces, text):
    tokenizer = AutoTokenizer.from_pretrained(repository / "configs" / "tiny_model")
    tokenizer.add_tokens([piece for piece in pieces if piece[0] == "<"], special_tokens=True)
    tokenizer.split_special_tokens = False
    ids = [*(token for piece in pieces for token in tokenizer.encode(piece)), tokenizer.eos_token_id]
    assert decode(tokenizer, [tokenizer.encode("Q<think>")], [ids]) == [("Q<think>", text)]


def test_reward_receives_prompt_with_special_tokens(policy):
    """A think tag may be a special token."""
    prompt = Prompt(Problem("1", "q", "2"), [*policy.tokenizer.encode("q"), policy.tokenizer.eos_token_id], "s")
    seen = []

    def watch(completions, golds, details):
        seen.append(details[0].prompt)
        return [0.0]

    grade_rollouts(policy, WeightedReward.of(watch), [prompt], [Sample([65], False, [0.0])], 9)
    assert seen == [f"q{policy.tokenizer.eos_token}"]


@pytest.mark.parametrize("batch_size", [2, 6])
def test_failing_reward_stops_sampling_and_leaves_no_thread(policy, batch_size):
    def broken(completions, golds):
        raise ZeroDivisionError("mine")

    engine = Scripted(policy, ["x"] * 6, batch_size)
    with pytest.raises(RuntimeError, match=r"data\.reward: broken .* raised ZeroDivisionError: mine"):
        sample_and_grade(policy, engine, WeightedReward.of(broken), prompts(policy, *GOLDS), 2, Sampling(LIMIT))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("grading")]


def test_process_forked_during_grading_can_grade(policy, reward):
    """Locks that the grading thread holds at the fork must not stay locked in the child."""
    children = []

    def before_each(start):
        if start != 2:
            return
        pid = os.fork()
        if pid == 0:  # the child exits here, without assertions or pytest
            try:
                right = [g.correct for g in reward.grader.grade([r"\boxed{x+y}", r"\boxed{x}"], ["y+x", "y+x"])]
                reward.close()
            finally:
                os._exit(0 if right == [True, False] else 1)
        children.append(pid)

    slow = [r"\boxed{\sum_{k=1}^{9999999} \frac{1}{k^k}}"] * 2 + TEXTS[:4]
    engine = Scripted(policy, slow, 2, before_each)
    found, _ = sample_and_grade(policy, engine, reward, prompts(policy, "7", *GOLDS[:2]), 2, Sampling(LIMIT))
    assert [completion.correct for completion in found] == [False, False, True, False, True, True]
    (pid,) = children
    limit = time.monotonic() + 60
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > limit:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    assert ended == (pid, 0)


INTERRUPTED = r"""
import sys, time, threading
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.functions import CorrectnessReward
from egspo_lightning.rollout.engine import Request, Sample
from egspo_lightning.rollout.grade_rollouts import sample_and_grade
from egspo_lightning.rollout.rollout_records import Prompt
from egspo_lightning.types import Problem, Sampling
from scripted_policy import BytePolicy

reward = WeightedReward.of(CorrectnessReward(deadline_s=1.0))

class Engine:
    def stream(self, lm, requests, sampling, *, eos_ids, pad_id):
        for i in range(len(requests)):
            if i == 2:
                while not reward.grader.worker_pids():
                    time.sleep(0.01)
                print(*reward.grader.worker_pids(), flush=True)
                time.sleep(60)
            yield [(i, Sample(list(rb"\boxed{x+1}"), False, [0.0] * 11))]

prompts = [Prompt(Problem(str(i), "q", "1+x"), [65], "s") for i in range(5)]
try:
    sample_and_grade(BytePolicy(), Engine(), reward, prompts, 1, Sampling(20))
except KeyboardInterrupt:
    reward.close()
    print([t.name for t in threading.enumerate()], reward.grader.worker_pids(), flush=True)
    sys.exit(42)
"""


def test_sigint_during_sampling_and_grading_ends_both():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        pids = [int(pid) for pid in program.stdout.readline().split()]
        assert pids
        program.send_signal(signal.SIGINT)
        output, _ = program.communicate(timeout=60)
    finally:
        program.kill()
    assert program.returncode == 42
    assert output == "['MainThread'] []\n"
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


class Statistics(list):
    """A list that accepts weak references."""


def test_sample_drops_token_statistics_before_the_next_batch(policy):
    watched = []

    class WithStatistics:
        """An engine that yields one sample at a time, with token statistics."""

        def stream(self, lm, requests, sampling, *, eos_ids, pad_id):
            for i in range(len(requests)):
                assert not any(found() for found in watched[:-2])
                statistics = [Statistics([0.5]), Statistics([0.7])]
                watched.extend(weakref.ref(numbers) for numbers in statistics)
                yield [(i, Sample([50 + i], True, *statistics))]
                del statistics

    found = sample(policy, WithStatistics(), prompts(policy, "1", "2"), 2, Sampling(1))
    assert [(tokens.token_ids, tokens.is_truncated) for tokens in found] == [([50 + i], True) for i in range(4)]
    assert not any(numbers() for numbers in watched)
