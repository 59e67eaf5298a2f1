"""Evaluation on the data side: benchmarks and a user's problems as batches, and their answers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from egspo_lightning.data.answer_formats import normalize_problem
from egspo_lightning.data.sources import FiniteProblems, ProblemSource
from egspo_lightning.data.training_data import PromptEncoder
from egspo_lightning.errors import UserError, require
from egspo_lightning.evaluation.answer_records import Answer
from egspo_lightning.evaluation.answer_sampling import AnswerSampling
from egspo_lightning.evaluation.benchmarks import Benchmark, require_different_ids
from egspo_lightning.evaluation.problem_batches import problem_batches
from egspo_lightning.rewards.extraction import extract_boxed
from egspo_lightning.rewards.format import with_opened_block
from egspo_lightning.rewards.grading import Grade, MathGrader
from egspo_lightning.rollout.engine import RolloutEngine
from egspo_lightning.rollout.generation import Prompt, Tokens, decode, prompt_texts, sample
from egspo_lightning.rollout.policy_protocol import RolloutPolicy
from egspo_lightning.types import Problem, ProblemBatch, Sampling

PREDICT = "predict"
"""What a user's own problems go by, where benchmarks have their names."""


class Share(NamedTuple):
    """Which part of the problems a rank answers, and how many at a time."""

    rank: int
    world_size: int
    batch_size: int


@dataclass
class Answerer:
    """Samples and grades answers; right or wrong, whatever reward training uses.

    Args:
        benchmarks: What can be measured.
        engine: Samples.
        grader: Says what is right.
        predict_sampling: How a user's own problems are answered.
        max_completion_length: Tokens of an answer at most, where neither a benchmark nor predict_sampling says.
        seed: Names the random streams.
    """

    benchmarks: list[Benchmark]
    engine: RolloutEngine
    grader: MathGrader
    predict_sampling: AnswerSampling
    max_completion_length: int
    seed: int

    _problems: dict[str, list[Problem]] = field(default_factory=dict, init=False, repr=False)
    _earlier: dict[str, Mapping[str, Sequence[Answer]]] = field(default_factory=dict, init=False, repr=False)

    def load(self, encoder: PromptEncoder) -> None:
        """Read the benchmarks once; a prompt that is too long is refused before anything is trained.

        Raises:
            UserError: two have the same name, one cannot be read, or a prompt is too long.
        """
        if self._problems:
            return
        for benchmark in self.benchmarks:
            if benchmark.name in self._problems:
                raise UserError(f"data.benchmarks: two are named {benchmark.name!r}. Give each a name of its own.")
            require(benchmark.name != PREDICT, "data.benchmarks: a name", repr(PREDICT), "another: that is a command")
            problems = self._problems[benchmark.name] = benchmark.load()
            for problem in problems:
                encoder.encode(problem)

    def load_questions(self, source: ProblemSource) -> None:
        """Read a user's own problems, with or without answers.

        Raises:
            UserError: the source never ends, is empty, cannot be read, or has two problems of the same id.
        """
        if not isinstance(source, FiniteProblems):
            raise UserError(
                f"data.problems: {type(source).__name__} never ends, so predict cannot answer all of it. Use a "
                "finite source, such as egspo_lightning.data.dataset_sources.DatasetProblems."
            )
        self.predict_sampling.require_different_samples("data.predict_sampling:")
        problems = source.load_questions()
        if not problems:
            raise UserError(f"data.problems: {type(source).__name__} holds none, so there is nothing to answer.")
        require_different_ids(problems, "data.problems")
        self._problems[PREDICT] = problems

    @property
    def asked(self) -> frozenset[str]:
        """The normalized texts of all that benchmarks ask."""
        return frozenset(normalize_problem(p.problem) for b in self.benchmarks for p in self._problems[b.name])

    def problems(self, name: str) -> list[Problem]:
        """What a benchmark asks, or what the user does."""
        return self._problems[name]

    def sampling(self, name: str) -> tuple[int, Sampling]:
        """How many answers each of its problems gets, and how they are sampled."""
        chosen = {benchmark.name: benchmark.sampling for benchmark in self.benchmarks}
        found = chosen.get(name, self.predict_sampling)
        return found.num_samples, found.within(self.max_completion_length)

    def batches(self, name: str, share: Share) -> list[ProblemBatch]:
        """A rank's share of a benchmark, or of the user's own problems."""
        return problem_batches(name, self._problems[name], *self.sampling(name), **share._asdict())

    def settings(self, name: str, encoder: PromptEncoder) -> dict[str, Any]:
        """All that decides on the answers, besides the policy and its precision; prompts and references by digest."""
        num_samples, sampling = self.sampling(name)
        asked = [(p.id, encoder.encode(p), p.answer) for p in self._problems[name]]
        return {
            "benchmark": name,
            "num_problems": len(asked),
            "problems": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
            "num_samples": num_samples,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_completion_length": sampling.max_completion_length,
            "seed": self.seed,
            "engine": type(self.engine).__name__.removeprefix("LazyInstance_"),  # jsonargparse's name for a default
            **self.grader.settings(),
        }

    def remember(self, name: str, answers: Mapping[str, Sequence[Answer]]) -> None:
        """Give these answers, by the ids of their problems, again instead of sampling them; none forgets them."""
        self._earlier[name] = answers

    def answer(self, policy: RolloutPolicy, encoder: PromptEncoder, batch: ProblemBatch) -> list[Answer]:
        """Sample and grade the answers to a batch of problems, those that are remembered excepted. Collective."""
        earlier = self._earlier.get(batch.benchmark, {})
        new = [problem for problem in batch.problems if problem.id not in earlier]
        prompts = [Prompt(p, encoder.encode(p), f"{self.seed}/{batch.benchmark}/{p.id}") for p in new]
        n = batch.num_samples
        samples = sample(policy, self.engine, prompts, n, batch.sampling)
        graded: list[Answer] = []
        if samples:
            asked = [text for text in prompt_texts(policy, prompts) for _ in range(n)]
            graded = self._grade(new, samples, decode(policy, samples), asked)
        fresh = {problem.id: graded[i * n : (i + 1) * n] for i, problem in enumerate(new)}
        return [answer for problem in batch.problems for answer in earlier.get(problem.id) or fresh[problem.id]]

    def _grade(
        self, problems: Sequence[Problem], samples: Sequence[Tokens], texts: Sequence[str], prompts: Sequence[str]
    ) -> list[Answer]:
        """The answers, with their texts; a box in reasoning that the prompt has opened is none."""
        n = len(samples) // len(problems)
        judged = [with_opened_block(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
        asked = [problem for problem in problems for _ in range(n)]
        known = [i for i, problem in enumerate(asked) if problem.answer]
        grades = dict(
            zip(known, self.grader.grade([judged[i] for i in known], [asked[i].answer for i in known]), strict=True)
        )
        found = [grades[i].extracted if i in grades else extract_boxed(text) for i, text in enumerate(judged)]
        groups = self.grader.equivalence_classes([found[i : i + n] for i in range(0, len(found), n)])
        classes = [answer_class for group in groups for answer_class in group]
        return [
            _answer(asked[i], i % n, texts[i], found[i], classes[i], grades.get(i), samples[i])
            for i in range(len(samples))
        ]

    def close(self) -> None:
        """End the grader's processes."""
        self.grader.close()


def _answer(
    problem: Problem,
    number: int,
    text: str,
    extracted: str | None,
    answer_class: int | None,
    grade: Grade | None,
    sampled: Tokens,
) -> Answer:
    return Answer(
        problem=problem,
        sample=number,
        text=text,
        extracted=extracted,
        answer_class=answer_class,
        correct=None if grade is None else grade.correct,
        status="no_reference" if grade is None else grade.status,
        length=len(sampled.token_ids),
        is_truncated=sampled.is_truncated,
    )
