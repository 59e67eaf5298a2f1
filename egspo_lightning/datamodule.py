"""The LightningDataModule: alternates between expert data and freshly sampled rollouts.

All sizes in its config are global: those of one optimiser step, or of one collection, over all ranks and accumulated
micro-batches. More ranks or ``--trainer.accumulate_grad_batches`` change speed and memory, never the update.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jsonargparse import lazy_instance
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from egspo_lightning.answers import normalise_problem
from egspo_lightning.data.expert import ExpertPool
from egspo_lightning.data.prompts import PromptTemplate
from egspo_lightning.data.sources import DemonstrationSource, FiniteProblems, ProblemSource
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.benchmarks import Benchmark
from egspo_lightning.ops.advantages import Advantage, GroupRelative
from egspo_lightning.policy import end_of_sequence_ids
from egspo_lightning.rewards.functions import CorrectnessReward, Reward
from egspo_lightning.rollout.engine import RolloutEngine, Sampling
from egspo_lightning.rollout.experience import Collection, Prompt, collect, complete
from egspo_lightning.rollout.minibatches import active_rows, assign_to_updates, micro_batches
from egspo_lightning.rollout.protocol import RolloutPolicy
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import Completion, Problem, RolloutBatch, Stage, TrainingBatch, UpdateSize


class ProblemBatch(NamedTuple):
    """Problems to answer in evaluation, and how."""

    benchmark: str
    problems: list[Problem]
    num_samples: int
    sampling: Sampling


class SizedLoader:
    """A loader whose length is known and whose batches are made when they are asked for, not before.

    The length keeps Lightning from prefetching, which would sample rollouts from a policy that is one update old.
    """

    def __init__(self, length: int, batches: Callable[[], Iterator[Any]]) -> None:
        self._length, self._batches = length, batches

    def __len__(self) -> int:
        """Batches an epoch."""
        return self._length

    def __iter__(self) -> Iterator[Any]:
        """Start making them."""
        return self._batches()


class HybridDataModule(LightningDataModule):
    """Gives a pass of demonstrations in stage SFT, and in stage EGSPO a fresh collection of rollouts an epoch.

    Args:
        demonstrations: Expert solutions.
        problems: Problems to sample rollouts for; those that also stand in a benchmark are dropped and counted.
        benchmarks: What MathBenchmark, validate and test measure.
        engine: Samples completions.
        reward: Scores completions in training.
        advantage: Turns the rewards of a group into advantages.
        prompt: How a problem is put to the model.
        sft_batch_size: Demonstrations an update in stage SFT.
        expert_batch_size: Demonstrations that an update in stage EGSPO carries where mu > 0.
        num_problems: Problems a rollout collection.
        num_generations: Completions a problem.
        num_ppo_epochs: Passes over a collection.
        num_minibatches: Updates a pass.
        max_prompt_length: Longest prompt in tokens; a longer one is an error, a demonstration with one is dropped.
        max_completion_length: Longest completion in tokens, EOS included; longer demonstrations are dropped.
        eval_batch_size: Problems answered at a time in evaluation, on each rank.
        seed: Order of the data and random streams of the rollouts; the command line sets it to seed_everything.
    """

    def __init__(
        self,
        demonstrations: DemonstrationSource,
        problems: ProblemSource,
        benchmarks: list[Benchmark] | None = None,
        engine: RolloutEngine = lazy_instance(TransformersEngine, max_batch_size=256),  # noqa: B008
        reward: Reward = lazy_instance(CorrectnessReward),  # noqa: B008
        advantage: Advantage = lazy_instance(GroupRelative),  # noqa: B008
        prompt: PromptTemplate = PromptTemplate(),  # noqa: B008  frozen, so it can be shared
        sft_batch_size: int = 64,
        expert_batch_size: int = 16,
        num_problems: int = 16,
        num_generations: int = 8,
        num_ppo_epochs: int = 1,
        num_minibatches: int = 1,
        max_prompt_length: int = 512,
        max_completion_length: int = 1024,
        eval_batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {name: value for name, value in locals().items() if name.startswith(("num_", "max_")) or "_batch" in name}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"data.{name} must be at least 1, got {value}.")
        if num_generations < advantage.min_generations:
            raise UserError(
                f"data.num_generations must be at least {advantage.min_generations} with data.advantage "
                f"{type(advantage).__name__}, got {num_generations}: it compares the completions of a group."
            )
        self.demonstrations, self.problems, self.benchmarks = demonstrations, problems, benchmarks or []
        self.engine, self.reward, self.advantage, self.prompt = engine, reward, advantage, prompt
        self.sft_batch_size, self.expert_batch_size = sft_batch_size, expert_batch_size
        self.num_problems, self.num_generations = num_problems, num_generations
        self.num_ppo_epochs, self.num_minibatches = num_ppo_epochs, num_minibatches
        self.max_prompt_length, self.max_completion_length = max_prompt_length, max_completion_length
        self.eval_batch_size, self.seed = eval_batch_size, seed
        self.num_passes = self.num_collections = 0  # of SFT data and of rollouts, begun in this run
        self.collection: Collection | None = None
        """The latest rollouts of this rank, for callbacks to look at."""
        self._benchmark_problems: dict[str, list[Problem]] = {}
        self._expert: ExpertPool | None = None
        self._eval_reward = CorrectnessReward()

    # Set-up

    def setup(self, stage: str) -> None:
        """Load what the run needs; drop what training shares with a benchmark."""
        if not self._benchmark_problems:
            self._load_benchmarks()
        if stage == TrainerFn.FITTING and self._expert is None:
            self._check_sizes()
            self._load_training_data()

    def _load_benchmarks(self) -> None:
        for benchmark in self.benchmarks:
            if benchmark.name in self._benchmark_problems:
                raise UserError(f"data.benchmarks: two are named {benchmark.name!r}. Give each a name of its own.")
            self._benchmark_problems[benchmark.name] = benchmark.load()

    def _load_training_data(self) -> None:
        excluded = frozenset(
            normalise_problem(problem.problem)
            for problems in self._benchmark_problems.values()
            for problem in problems
        )
        loaded = self.demonstrations.load()
        clean = [item for item in loaded if normalise_problem(item.problem) not in excluded]
        if not clean:
            raise UserError(
                f"data.demonstrations: all {len(loaded)} stand in a benchmark. Use other demonstrations or benchmarks."
            )
        num_dropped = self.problems.prepare(self.seed, excluded)
        self._expert = ExpertPool.encode(
            clean,
            self.prompt,
            self._policy.tokenizer,
            max_prompt_length=self.max_prompt_length,
            max_completion_length=self.max_completion_length,
            seed=self.seed,
        )
        rank_zero_info(
            f"Data: {len(self._expert.demonstrations)} demonstrations ({len(loaded) - len(clean)} dropped because a "
            f"benchmark asks them, {self._expert.num_dropped} because they are too long); {num_dropped} training "
            "problems dropped because a benchmark asks them."
        )

    def _check_sizes(self) -> None:
        world_size = self.trainer.world_size
        if self.num_problems % world_size:
            raise UserError(
                f"data.num_problems must be a multiple of the number of ranks: {self.num_problems} problems cannot be "
                f"shared evenly among {world_size}."
            )
        if self.num_minibatches > self.num_problems * self.num_generations // world_size:
            raise UserError(
                f"data.num_minibatches = {self.num_minibatches} is more than the "
                f"{self.num_problems * self.num_generations // world_size} completions that a rank has."
            )

    def teardown(self, stage: str) -> None:
        """End the graders' processes."""
        for reward in (self.reward, self._eval_reward):
            if hasattr(reward, "close"):
                reward.close()

    # Training

    def train_dataloader(self) -> SizedLoader:
        """The loader of the coming epoch, by the policy's stage."""
        if self._policy.stage == Stage.SFT:
            num_updates = -(-len(self._expert_pool.demonstrations) // self.sft_batch_size)
            return SizedLoader(num_updates * self._parts, self._sft_batches)
        num_updates = self.num_ppo_epochs * self.num_minibatches
        return SizedLoader(num_updates * self._parts, self._rollout_batches)

    def _sft_batches(self) -> Iterator[TrainingBatch]:
        num_demonstrations = len(self._expert_pool.demonstrations)
        order = self._expert_pool.draw(self.num_passes * num_demonstrations, num_demonstrations)
        self.num_passes += 1
        for start in range(0, num_demonstrations, self.sft_batch_size):
            update = order[start : start + self.sft_batch_size]
            for expert in self._expert_pool.micro_batches(update, *self._share):
                yield TrainingBatch(Stage.SFT, None, expert)

    def _rollout_batches(self) -> Iterator[TrainingBatch]:
        number = self.num_collections
        self.num_collections += 1
        numbers = range(self.trainer.global_rank, self.num_problems, self.trainer.world_size)
        self.collection = self._collect(number, numbers)
        updates = [
            rows
            for epoch in range(self.num_ppo_epochs)
            for rows in assign_to_updates(
                numbers, self.num_generations, self.num_minibatches, seed=f"{self.seed}/{number}/{epoch}"
            )
        ]
        sizes = self._update_sizes(self.collection.rollout, updates)
        for i, (rows, size) in enumerate(zip(updates, sizes, strict=True)):
            rollouts = micro_batches(
                self.collection.rollout, rows, self._parts, size, keep_inactive=self._policy.needs_every_rollout
            )
            experts = self._expert_micro_batches(number * len(updates) + i)
            for rollout, expert in zip(rollouts, experts, strict=True):
                yield TrainingBatch(Stage.EGSPO, rollout, expert)

    def _collect(self, number: int, numbers: Sequence[int]) -> Collection:
        drawn = self.problems.draw(number * self.num_problems, self.num_problems)
        prompts = [
            Prompt(drawn[i], self._encode(drawn[i]), f"{self.seed}/{number}/{i}") for i in numbers
        ]
        collection = collect(
            self._policy,
            self.engine,
            self.reward,
            self.advantage,
            prompts,
            self.num_generations,
            self.max_completion_length,
            eos_ids=self._eos_ids(),
        )
        return collection._replace(rollout=self._policy.admit(collection.rollout, collection.measurements))

    def _update_sizes(self, rollout: RolloutBatch, updates: Sequence[Sequence[int]]) -> list[UpdateSize]:
        """The size of each update, summed over the ranks."""
        lengths = rollout.completion_mask.sum(-1)
        local = [
            [float(lengths[list(rows)].sum()), float(len(rows)), float(len(active_rows(rollout, rows)))]
            for rows in updates
        ]
        totals = self._policy.sum_over_ranks(torch.tensor(local, dtype=torch.float64)).tolist()
        return [UpdateSize(tokens, sequences, self.max_completion_length, active) for tokens, sequences, active in totals]

    def _expert_micro_batches(self, update_number: int) -> list[Any]:
        if not self._policy.mixes_expert_data:
            return [None] * self._parts
        update = self._expert_pool.draw(update_number * self.expert_batch_size, self.expert_batch_size)
        return self._expert_pool.micro_batches(update, *self._share)

    # Evaluation

    def val_dataloader(self) -> list[SizedLoader]:
        """The benchmarks, one loader each; in fit MathBenchmark asks for them when it wants them."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            return []
        return self.test_dataloader()

    def test_dataloader(self) -> list[SizedLoader]:
        """The benchmarks, one loader each."""
        if not self.benchmarks:
            raise UserError("data.benchmarks is empty: there is nothing to measure. Name at least one benchmark.")
        return [self.benchmark_loader(benchmark) for benchmark in self.benchmarks]

    def predict_dataloader(self) -> SizedLoader:
        """The problems of a finite source, each once and in its order."""
        if not isinstance(self.problems, FiniteProblems):
            raise UserError(
                f"data.problems: {type(self.problems).__name__} never ends, so predict cannot answer all of it. Use a "
                "finite source, such as egspo_lightning.data.jsonl.JsonlProblems."
            )
        sampling = Sampling(max_completion_length=self.max_completion_length, temperature=0.0)
        return self._problem_loader("predict", self.problems.load(), 1, sampling)

    def benchmark_loader(self, benchmark: Benchmark) -> SizedLoader:
        """This rank's share of a benchmark."""
        sampling = Sampling(
            max_completion_length=benchmark.max_completion_length or self.max_completion_length,
            temperature=benchmark.temperature,
            top_p=benchmark.top_p,
        )
        problems = self._benchmark_problems[benchmark.name]
        return self._problem_loader(benchmark.name, problems, benchmark.num_samples, sampling)

    def answer(self, batch: ProblemBatch) -> list[Completion]:
        """Sample and grade the completions of a batch of problems."""
        if not batch.problems:
            return []
        prompts = [
            Prompt(problem, self._encode(problem), f"{self.seed}/{batch.benchmark}/{problem.id}")
            for problem in batch.problems
        ]
        return complete(
            self._policy,
            self.engine,
            self._eval_reward,
            prompts,
            batch.num_samples,
            batch.sampling,
            eos_ids=self._eos_ids(),
        )

    def _problem_loader(self, name: str, problems: list[Problem], num_samples: int, sampling: Sampling) -> SizedLoader:
        """Every rank has the same number of batches, the last ones of some may be empty."""
        world_size, size = self.trainer.world_size, self.eval_batch_size
        share = problems[self.trainer.global_rank :: world_size]
        length = -(-len(problems) // (world_size * size))

        def batches() -> Iterator[ProblemBatch]:
            for i in range(length):
                yield ProblemBatch(name, share[i * size : (i + 1) * size], num_samples, sampling)

        return SizedLoader(length, batches)

    # Both

    def _encode(self, problem: Problem) -> list[int]:
        ids = self.prompt.encode(self._policy.tokenizer, problem.problem)
        if len(ids) > self.max_prompt_length:
            raise UserError(
                f"data.max_prompt_length = {self.max_prompt_length} is shorter than the prompt of problem "
                f"{problem.id!r}, which has {len(ids)} tokens. Raise it to {len(ids)} or more."
            )
        return ids

    def _eos_ids(self) -> list[int]:
        with self._policy.sampling() as lm:
            return end_of_sequence_ids(lm, self._policy.tokenizer)

    @property
    def _policy(self) -> RolloutPolicy:
        return self.trainer.lightning_module  # type: ignore[no-any-return]

    @property
    def _expert_pool(self) -> ExpertPool:
        assert self._expert is not None, "setup has not run"
        return self._expert

    @property
    def _parts(self) -> int:
        """Micro-batches an update, on each rank."""
        return self.trainer.accumulate_grad_batches

    @property
    def _share(self) -> tuple[int, int, int]:
        return self.trainer.global_rank, self.trainer.world_size, self._parts

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """How far the streams of data have been drawn."""
        return {"num_passes": self.num_passes, "num_collections": self.num_collections}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where they were."""
        self.num_passes, self.num_collections = state_dict["num_passes"], state_dict["num_collections"]
