"""Evaluation on the data side: benchmarks and a user's problems as batches, and their answers."""

from dataclasses import dataclass, field
from typing import NamedTuple

from egspo_lightning.answers import normalise_problem
from egspo_lightning.data.training import PromptEncoder
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.benchmarks import Benchmark
from egspo_lightning.evaluation.problems import problem_batches
from egspo_lightning.rewards.functions import CorrectnessReward
from egspo_lightning.rollout.engine import RolloutEngine
from egspo_lightning.rollout.protocol import RolloutPolicy
from egspo_lightning.rollout.sampling import Prompt, complete
from egspo_lightning.types import Completion, Problem, ProblemBatch, Sampling


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
        max_completion_length: Tokens of an answer at most, where a benchmark does not say.
        seed: Names the random streams.
    """

    benchmarks: list[Benchmark]
    engine: RolloutEngine
    max_completion_length: int
    seed: int

    _problems: dict[str, list[Problem]] = field(default_factory=dict, init=False, repr=False)
    _reward: CorrectnessReward = field(default_factory=CorrectnessReward, init=False, repr=False)

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
            problems = self._problems[benchmark.name] = benchmark.load()
            for problem in problems:
                encoder.encode(problem)

    @property
    def asked(self) -> frozenset[str]:
        """The normalised texts of all that benchmarks ask."""
        return frozenset(normalise_problem(p.problem) for problems in self._problems.values() for p in problems)

    def length(self, benchmark: Benchmark) -> int:
        """Tokens of an answer at most."""
        return benchmark.sampling.within(self.max_completion_length).max_completion_length

    def benchmark_batches(self, benchmark: Benchmark, share: Share) -> list[ProblemBatch]:
        """A rank's share of a benchmark."""
        sampling = benchmark.sampling.within(self.max_completion_length)
        problems = self._problems[benchmark.name]
        return problem_batches(benchmark.name, problems, benchmark.num_samples, sampling, **share._asdict())

    def problem_batches(self, problems: list[Problem], share: Share) -> list[ProblemBatch]:
        """A rank's share of a user's problems, to be answered once and greedily."""
        sampling = Sampling(self.max_completion_length, temperature=0.0)
        return problem_batches("predict", problems, 1, sampling, **share._asdict())

    def answer(self, policy: RolloutPolicy, encoder: PromptEncoder, batch: ProblemBatch) -> list[Completion]:
        """Sample and grade the completions of a batch of problems. Collective."""
        prompts = [
            Prompt(problem, encoder.encode(problem), f"{self.seed}/{batch.benchmark}/{problem.id}")
            for problem in batch.problems
        ]
        return complete(policy, self.engine, self._reward, prompts, batch.num_samples, batch.sampling)

    def close(self) -> None:
        """End the grader's processes."""
        self._reward.close()
