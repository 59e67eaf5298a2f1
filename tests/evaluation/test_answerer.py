"""Answering benchmarks: think blocks opened by the prompt, and batches over ranks."""

from contextlib import contextmanager

import pytest
from transformers import AutoTokenizer

from egspo_lightning.data.prompts import PromptEncoder, PromptTemplate
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.answerer import Answerer
from egspo_lightning.evaluation.answers import AnswerSampling
from egspo_lightning.evaluation.benchmarks import Benchmark
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rollout.engine import Sample
from egspo_lightning.types import Problem, ProblemBatch, Sampling

THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
COMPLETIONS = [
    (r"2 + 2 is \boxed{4}, so", None, False),  # the block is never closed: all of it is reasoning
    (r"2 + 2 is \boxed{5}, no</think>It is \boxed{4}.", "4", True),
    (r"2 + 2 is \boxed{4}</think>as found above", None, False),
]


class ThinkingPolicy:
    """The parts of a policy that the answerer uses, with the given chat template."""

    def __init__(self, folder, template):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.chat_template = template
        self.eos_ids = [self.tokenizer.eos_token_id]

    @contextmanager
    def sampling(self, *, whole=True):
        yield None


class Scripted:
    """An engine that returns the given texts for every request."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts = tokenizer, texts

    def stream(self, lm, requests, sampling, *, eos_ids, pad_id):
        ids = [self.tokenizer.encode(text) for text in self.texts]
        yield [(i, Sample(row, False, [0.0] * len(row))) for i, row in enumerate(ids)]


@pytest.mark.parametrize("answer", ["4", ""], ids=["reference", "no reference"])
def test_boxed_text_inside_an_open_think_block_is_not_the_answer(tiny_model, answer):
    answers = answers_to(ThinkingPolicy(tiny_model, THINKING), answer)
    assert [a.extracted for a in answers] == [extracted for _, extracted, _ in COMPLETIONS]
    assert [a.answer_class is None for a in answers] == [extracted is None for _, extracted, _ in COMPLETIONS]
    assert [a.completion for a in answers] == [text for text, _, _ in COMPLETIONS]
    if answer:
        assert [a.correct for a in answers] == [correct for _, _, correct in COMPLETIONS]
        assert [a.status for a in answers] == ["no_answer", "graded", "no_answer"]


def test_boxed_text_without_think_block_is_the_answer(tiny_model):
    answers = answers_to(ThinkingPolicy(tiny_model, THINKING.replace("<think>\n", "")), "4")
    assert [a.extracted for a in answers] == ["4", "4", None]


def answers_to(policy, answer):
    encoder = PromptEncoder(PromptTemplate(use_chat_template="always"), policy.tokenizer, 512)
    texts = [text for text, _, _ in COMPLETIONS]
    with MathGrader() as grader:
        answerer = Answerer([], Scripted(policy.tokenizer, texts), grader, AnswerSampling(), 512, seed=0)
        problems = [Problem(id="sum", problem="2 + 2?", answer=answer)]
        batch = ProblemBatch("predict", problems, len(texts), Sampling(max_completion_length=512))
        return answerer.answer(policy, encoder, batch)


class Sums(Benchmark):
    """The first problems of an endless list."""

    def read(self):
        return problems(self.limit)


def problems(count: int) -> list[Problem]:
    return [Problem(str(i), f"{i}+0=?", str(i)) for i in range(count)]


def batches_of(count: int, num_samples: int, rank: int, world_size: int, batch_size: int) -> list[ProblemBatch]:
    benchmark = Sums("b", num_samples=num_samples, temperature=0.5, max_completion_length=7, limit=count)
    with MathGrader() as grader:
        answerer = Answerer([benchmark], None, grader, AnswerSampling(), 512, seed=0)
        answerer.load(NoLimit())
        return answerer.batches("b", rank, world_size, batch_size)


def test_extraction_is_chosen_per_benchmark():
    benchmarks = [Sums("own", extraction="lenient", limit=1), Sums("default", limit=1)]
    with MathGrader() as grader:
        answerer = Answerer(benchmarks, None, grader, AnswerSampling(), 512, seed=0)
        answerer.load(NoLimit())
        settings = [answerer.settings(name, NoLimit())["extraction"] for name in ("own", "default")]
        (grade,) = grader.grade(["It is 4."], ["4"], answerer.extraction("own"))
    assert settings == ["lenient", "boxed"]
    assert grade.correct


def test_each_load_checks_prompts_with_its_tokenizer_and_forgets_earlier_answers():
    class Short(NoLimit):
        def encode(self, problem):
            raise UserError("too long")

    with MathGrader() as grader:
        answerer = Answerer([Sums("b", limit=1)], None, grader, AnswerSampling(), 512, seed=0)
        answerer.load(NoLimit())
        answerer.earlier["b"] = {"0": []}  # of an evaluation that failed
        with pytest.raises(UserError, match="too long"):
            answerer.load(Short())
    assert answerer.earlier == {}


class NoLimit:
    """An encoder that accepts prompts of every length."""

    def encode(self, problem):
        return []


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 12, 13])
def test_ranks_share_all_problems_in_equal_numbers_of_batches(world_size, batch_size, count):
    ranks = [batches_of(count, 3, rank, world_size, batch_size) for rank in range(world_size)]
    sampling = Sampling(max_completion_length=7, temperature=0.5)
    assert len({len(batches) for batches in ranks}) == 1
    answered = [problem for batches in ranks for batch in batches for problem in batch.problems]
    assert sorted(answered) == sorted(problems(count))  # each problem exactly once
    sizes = [len(batch.problems) for batches in ranks for batch in batches]
    assert max(sizes) <= batch_size
    shares = [sum(len(batch.problems) for batch in batches) for batches in ranks]
    assert max(shares) - min(shares) <= 1
    for batches in ranks:
        assert all((batch.benchmark, batch.num_samples, batch.sampling) == ("b", 3, sampling) for batch in batches)


def test_batches_of_two_ranks_by_hand():
    first, second = (batches_of(5, 1, rank, 2, 2) for rank in range(2))
    assert [[p.id for p in batch.problems] for batch in first] == [["0", "2"], ["4"]]
    assert [[p.id for p in batch.problems] for batch in second] == [["1", "3"], []]
