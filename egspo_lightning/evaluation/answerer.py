"""Evaluation: samples and grades the answers to benchmarks and to a user's own problems."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from egspo_lightning.data.answer_formats import normalize_problem
from egspo_lightning.data.decoding import decode
from egspo_lightning.data.prompts import PromptEncoder
from egspo_lightning.data.sources import FiniteProblems, ProblemSource
from egspo_lightning.errors import UserError, require
from egspo_lightning.evaluation.answers import Answer, AnswerSampling
from egspo_lightning.evaluation.benchmarks import Benchmark, require_different_ids
from egspo_lightning.rewards.extraction import extract_boxed
from egspo_lightning.rewards.grading import Extraction, MathGrader
from egspo_lightning.rollout.engine import RolloutEngine, Sample, sample
from egspo_lightning.rollout.policy_protocol import RolloutPolicy
from egspo_lightning.rollout.rollout_records import Prompt
from egspo_lightning.types import Problem, ProblemBatch, Sampling

PREDICT = "predict"
"""Name of the user's own problems, in place of a benchmark's."""


@dataclass
class Answerer:
    """Samples and grades answers. The verdict is right or wrong, whatever the reward in training.

    Args:
        benchmarks: All benchmarks of the config.
        engine: Samples the answers.
        grader: Grades them.
        predict_sampling: Sampling of the answers to a user's own problems.
        max_completion_length: Longest answer in tokens, where neither a benchmark nor predict_sampling sets one.
        seed: Seed of the random streams.
    """

    benchmarks: list[Benchmark]
    engine: RolloutEngine
    grader: MathGrader
    predict_sampling: AnswerSampling
    max_completion_length: int
    seed: int

    problems: dict[str, list[Problem]] = field(default_factory=dict, init=False, repr=False)
    """The problems of each benchmark by its name, and the user's own under the name ``PREDICT``."""
    earlier: dict[str, Mapping[str, Sequence[Answer]]] = field(default_factory=dict, init=False, repr=False)
    """Answers to a benchmark, by problem id, to return instead of sampling new ones."""

    def load(self, encoder: PromptEncoder) -> None:
        """Read the benchmarks once, check the lengths of their prompts, and forget the answers of earlier evaluations.

        Raises:
            UserError: two benchmarks have the same name, one cannot be read, or a prompt is too long.
        """
        self.earlier.clear()
        names = [benchmark.name for benchmark in self.benchmarks]
        for benchmark in self.benchmarks:
            if names.count(benchmark.name) > 1:
                raise UserError(f"data.benchmarks: two are named {benchmark.name!r}. Give each a name of its own.")
            require(benchmark.name != PREDICT, "data.benchmarks: a name", repr(PREDICT), "another: that is a command")
            if benchmark.name not in self.problems:
                self.problems[benchmark.name] = benchmark.load()
            for problem in self.problems[benchmark.name]:
                encoder.encode(problem)

    def load_questions(self, source: ProblemSource) -> None:
        """Read a user's own problems, with or without answers.

        Raises:
            UserError: the source is endless or empty, cannot be read, or has two problems with the same id.
        """
        if not isinstance(source, FiniteProblems):
            raise UserError(
                f"data.problems: {type(source).__name__} never ends, so predict cannot answer all of it. Use a "
                "finite source, such as DatasetProblems."
            )
        self.predict_sampling.require_different_samples("data.predict_sampling:")
        problems = source.load_questions()
        if not problems:
            raise UserError(f"data.problems: {type(source).__name__} holds none, so there is nothing to answer.")
        require_different_ids(problems, "data.problems")
        self.problems[PREDICT] = problems

    @property
    def asked(self) -> frozenset[str]:
        """The normalized texts of all benchmark problems, which training leaves out."""
        return frozenset(normalize_problem(p.problem) for b in self.benchmarks for p in self.problems[b.name])

    def sampling(self, name: str) -> tuple[int, Sampling]:
        """The number of answers to each problem, and their sampling."""
        found = next((b.sampling for b in self.benchmarks if b.name == name), self.predict_sampling)
        return int(found.num_samples), found.within(self.max_completion_length)

    def extraction(self, name: str) -> Extraction:
        """Where the answers to a benchmark, or to the user's own problems, are found."""
        return next((b.extraction for b in self.benchmarks if b.name == name), None) or self.grader.extraction

    def batches(self, name: str, rank: int, world_size: int, batch_size: int) -> list[ProblemBatch]:
        """Split the problems of a benchmark, or the user's own, into one rank's batches.

        A rank has every ``world_size``-th problem. All ranks get the same number of batches, since sampling is
        collective; the last one may be empty.
        """
        problems = self.problems[name]
        own, num_batches = problems[rank::world_size], -(-len(problems) // (world_size * batch_size))
        parts = [own[i * batch_size : (i + 1) * batch_size] for i in range(num_batches)]
        return [ProblemBatch(name, part, *self.sampling(name)) for part in parts]

    def settings(self, name: str, encoder: PromptEncoder) -> dict[str, Any]:
        """All settings that determine the answers, apart from the policy; prompts and gold answers as a hash."""
        num_samples, sampling = self.sampling(name)
        asked = [(p.id, encoder.encode(p), p.answer) for p in self.problems[name]]
        return {
            "benchmark": name,
            "num_problems": len(asked),
            "problems": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
            "num_samples": num_samples,
            **sampling._asdict(),
            "seed": self.seed,
            "engine": type(self.engine).__name__,
            **self.grader.settings(),
            "extraction": self.extraction(name),
        }

    def answer(self, policy: RolloutPolicy, encoder: PromptEncoder, batch: ProblemBatch) -> list[Answer]:
        """Sample and grade the answers to a batch of problems; those in ``earlier`` are reused. Collective."""
        earlier = self.earlier.get(batch.benchmark, {})
        new = [problem for problem in batch.problems if problem.id not in earlier]
        prompts = [Prompt(p, encoder.encode(p), f"{self.seed}/{batch.benchmark}/{p.id}") for p in new]
        n = batch.num_samples
        samples = sample(policy, self.engine, prompts, n, batch.sampling)
        graded = self._grade(policy, prompts, samples, self.extraction(batch.benchmark)) if samples else []
        fresh = {problem.id: graded[i * n : (i + 1) * n] for i, problem in enumerate(new)}
        return [answer for problem in batch.problems for answer in earlier.get(problem.id) or fresh[problem.id]]

    def _grade(
        self, policy: RolloutPolicy, prompts: Sequence[Prompt], samples: Sequence[Sample], extraction: Extraction
    ) -> list[Answer]:
        """Grade the samples. A box inside reasoning that the prompt has opened does not count as an answer."""
        n = len(samples) // len(prompts)
        asked_ids = [prompt.token_ids for prompt in prompts for _ in range(n)]
        decoded = decode(policy.tokenizer, asked_ids, [sampled.token_ids for sampled in samples])
        judged = [it.judged for it in decoded]
        asked = [prompt.problem for prompt in prompts for _ in range(n)]
        known = [i for i, problem in enumerate(asked) if problem.answer]
        graded = self.grader.grade([judged[i] for i in known], [asked[i].answer for i in known], extraction)
        grades = dict(zip(known, graded, strict=True))
        found = [grades[i].extracted if i in grades else extract_boxed(text) for i, text in enumerate(judged)]
        groups = self.grader.equivalence_classes([found[i : i + n] for i in range(0, len(found), n)])
        classes = [answer_class for group in groups for answer_class in group]
        return [
            Answer(
                problem=asked[i],
                sample=i % n,
                completion=decoded[i].text,
                extracted=found[i],
                answer_class=classes[i],
                correct=grades[i].correct if i in grades else None,
                status=grades[i].status if i in grades else "no_reference",
                length=len(sampled.token_ids),
                is_truncated=sampled.is_truncated,
            )
            for i, sampled in enumerate(samples)
        ]
