"""The LightningDataModule: alternates between expert data and freshly sampled rollouts.

All sizes in its config are global: those of one optimiser step, or of one collection, over all ranks and accumulated
micro-batches. More ranks or ``--trainer.accumulate_grad_batches`` change speed and memory, never the update.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jsonargparse.typing import lazy_instance
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from egspo_lightning.answers import normalise_problem
from egspo_lightning.data.expert import ExpertPool
from egspo_lightning.data.prompts import PromptTemplate
from egspo_lightning.data.sources import DemonstrationSource, FiniteProblems, ProblemSource
from egspo_lightning.data.training import LongProblems, PromptEncoder, load_demonstrations, prepare_problems
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.benchmarks import Benchmark
from egspo_lightning.evaluation.problems import problem_batches
from egspo_lightning.ops.advantages import Advantage, GroupRelative
from egspo_lightning.rewards.functions import CorrectnessReward, Reward
from egspo_lightning.rollout.engine import RolloutEngine
from egspo_lightning.rollout.experience import Collection, Prompt, collect, complete
from egspo_lightning.rollout.minibatches import count_updates, micro_batches, plan_updates
from egspo_lightning.rollout.protocol import RolloutPolicy
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.types import (
    Completion,
    ExpertBatch,
    Problem,
    ProblemBatch,
    Sampling,
    Stage,
    TrainingBatch,
    UpdateSize,
)


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
        max_prompt_length: Longest prompt in tokens; a demonstration with a longer one is dropped.
        long_problems: What becomes of training problems with longer prompts: "error", or "drop", which counts them.
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
        long_problems: LongProblems = "error",
        eval_batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.demonstrations, self.problems, self.benchmarks = demonstrations, problems, benchmarks or []
        self.engine, self.reward, self.advantage, self.prompt = engine, reward, advantage, prompt
        self.sft_batch_size, self.expert_batch_size = sft_batch_size, expert_batch_size
        self.num_problems, self.num_generations = num_problems, num_generations
        self.num_ppo_epochs, self.num_minibatches = num_ppo_epochs, num_minibatches
        self.max_prompt_length, self.max_completion_length = max_prompt_length, max_completion_length
        self.eval_batch_size, self.seed, self.long_problems = eval_batch_size, seed, long_problems
        self._require_sizes()
        self.num_passes = self.num_collections = 0  # of SFT data and of rollouts, begun in this run
        self.collection: Collection | None = None
        """The latest rollouts of this rank, for callbacks to look at."""
        self._benchmark_problems: dict[str, list[Problem]] = {}
        self._expert: ExpertPool | None = None
        self._eval_reward = CorrectnessReward()

    def _require_sizes(self) -> None:
        for name, value in vars(self).items():
            if name.startswith(("num_", "max_")) or name.endswith("_batch_size"):
                _require(value >= 1, name, value, "at least 1")
        least = self.advantage.min_generations
        allowed = f"at least {least} with data.advantage {type(self.advantage).__name__}, which compares a group"
        _require(self.num_generations >= least, "num_generations", self.num_generations, allowed)

    # Set-up

    def setup(self, stage: str) -> None:
        """Load what the run needs; drop what training shares with a benchmark."""
        if not self._benchmark_problems:
            self._load_benchmarks()
        if stage == TrainerFn.FITTING and self._expert is None:
            self._require_phases()
            self._require_shares()
            self._load_training_data()

    def _load_benchmarks(self) -> None:
        for benchmark in self.benchmarks:
            if benchmark.name in self._benchmark_problems:
                raise UserError(f"data.benchmarks: two are named {benchmark.name!r}. Give each a name of its own.")
            problems = self._benchmark_problems[benchmark.name] = benchmark.load()
            for problem in problems:  # what is too long is refused before anything is trained
                self._encoder.encode(problem)

    def _load_training_data(self) -> None:
        asked = [problem for problems in self._benchmark_problems.values() for problem in problems]
        excluded = frozenset(normalise_problem(problem.problem) for problem in asked)
        length = self.max_completion_length
        self._expert, num_asked = load_demonstrations(
            self.demonstrations, self._encoder, excluded, max_completion_length=length, seed=self.seed
        )
        dropped = prepare_problems(
            self.problems, self._encoder, excluded, long_problems=self.long_problems, seed=self.seed
        )
        rank_zero_info(
            f"Data: {len(self._expert.demonstrations)} demonstrations (dropped: {num_asked} that a benchmark asks, "
            f"{self._expert.num_dropped} that are too long). Training problems dropped because a benchmark asks them: "
            f"{dropped[0]}; because they are too long: {dropped[1]}."
        )

    def _require_phases(self) -> None:
        """Refuse flags under which an epoch would not be a phase."""
        trainer: Any = self._trainer  # Lightning sets these attributes where type checkers do not see it
        if trainer.reload_dataloaders_every_n_epochs != 1:
            raise UserError(
                "trainer.reload_dataloaders_every_n_epochs must be 1, since each epoch has a loader of its own, got "
                f"{trainer.reload_dataloaders_every_n_epochs}."
            )
        limit = trainer.limit_train_batches
        whole = limit == 1.0 if isinstance(limit, float) else limit > 0 and limit % trainer.accumulate_grad_batches == 0
        if not whole or trainer.overfit_batches:
            raise UserError(
                f"trainer.limit_train_batches = {limit} (overfit_batches = {trainer.overfit_batches}) would cut an "
                f"update into pieces. Give a multiple of accumulate_grad_batches = {trainer.accumulate_grad_batches}, "
                "or change data.num_problems and data.num_ppo_epochs instead."
            )

    def _require_positions(self, completion_length: int) -> None:
        longest, most = self.max_prompt_length + completion_length, self._policy.max_positions
        if most is not None and longest > most:
            raise UserError(
                f"data.max_prompt_length + max_completion_length = {self.max_prompt_length} + {completion_length} is "
                f"more than the {most} positions of the model. Lower one of them."
            )

    def _require_shares(self) -> None:
        ranks = self._trainer.world_size
        allowed = f"a multiple of the {ranks} ranks, which share the problems evenly"
        _require(self.num_problems % ranks == 0, "num_problems", self.num_problems, allowed)
        most = self.num_problems * self.num_generations // ranks
        allowed = f"at most {most}, the completions that each rank has"
        _require(self.num_minibatches <= most, "num_minibatches", self.num_minibatches, allowed)

    def teardown(self, stage: str) -> None:
        """End the graders' processes."""
        for reward in (self.reward, self._eval_reward):
            if hasattr(reward, "close"):
                reward.close()

    # Training

    def train_dataloader(self) -> SizedLoader:
        """The loader of the coming epoch, by the policy's stage."""
        self._require_positions(self.max_completion_length)
        if self._policy.stage == Stage.SFT:
            num_updates = -(-len(self._expert_pool.demonstrations) // self.sft_batch_size)
            return SizedLoader(num_updates * self._parts, self._sft_batches)
        return SizedLoader(self.num_ppo_epochs * self.num_minibatches * self._parts, self._rollout_batches)

    def _sft_batches(self) -> Iterator[TrainingBatch]:
        """One pass over the demonstrations."""
        num_demonstrations = len(self._expert_pool.demonstrations)
        order = self._expert_pool.draw(self.num_passes * num_demonstrations, num_demonstrations)
        self.num_passes += 1
        for start in range(0, num_demonstrations, self.sft_batch_size):
            update = order[start : start + self.sft_batch_size]
            for expert in self._expert_pool.micro_batches(update, *self._share):
                yield TrainingBatch(Stage.SFT, None, expert)

    def _rollout_batches(self) -> Iterator[TrainingBatch]:
        """One collection of rollouts, and the updates on it."""
        number = self.num_collections
        self.num_collections += 1
        numbers = range(self._trainer.global_rank, self.num_problems, self._trainer.world_size)
        self.collection = self._collect(number, numbers)
        rollout = self.collection.rollout
        seed = f"{self.seed}/{number}"
        updates = plan_updates(numbers, self.num_generations, self.num_minibatches, self.num_ppo_epochs, seed=seed)
        keep = self._policy.needs_every_rollout
        counts = self._policy.sum_over_ranks(count_updates(rollout, updates, keep_inactive=keep)).tolist()
        for i, (rows, (tokens, sequences, active)) in enumerate(zip(updates, counts, strict=True)):
            size = UpdateSize(tokens, sequences, float(self.max_completion_length), active)
            parts = micro_batches(rollout, rows, self._parts, size, keep_inactive=keep)
            for part, expert in zip(parts, self._expert_parts(number * len(updates) + i), strict=True):
                yield TrainingBatch(Stage.EGSPO, part, expert)

    def _collect(self, number: int, numbers: Sequence[int]) -> Collection:
        """Collection ``number``, of the problems of this rank."""
        drawn = self.problems.draw(number * self.num_problems, self.num_problems)
        collection = collect(
            self._policy,
            self.engine,
            self.reward,
            self.advantage,
            [self._prompt(drawn[i], f"{number}/{i}") for i in numbers],
            self.num_generations,
            self.max_completion_length,
        )
        return collection._replace(rollout=self._policy.admit(collection.rollout, collection.measurements))

    def _expert_parts(self, update_number: int) -> Sequence[ExpertBatch | None]:
        """The demonstrations that an update in stage EGSPO carries, in micro-batches."""
        if not self._policy.mixes_expert_data:
            return [None] * self._parts
        update = self._expert_pool.draw(update_number * self.expert_batch_size, self.expert_batch_size)
        return self._expert_pool.micro_batches(update, *self._share)

    # Evaluation

    def val_dataloader(self) -> list[SizedLoader]:
        """The benchmarks, one loader each; in fit MathBenchmark asks for them when it wants them."""
        return [] if self._trainer.state.fn == TrainerFn.FITTING else self.test_dataloader()

    def test_dataloader(self) -> list[SizedLoader]:
        """The benchmarks, one loader each."""
        _require(bool(self.benchmarks), "benchmarks", "none", "at least one, or there is nothing to measure")
        return [_loader(self.benchmark_batches(benchmark)) for benchmark in self.benchmarks]

    def predict_dataloader(self) -> SizedLoader:
        """The problems of a finite source, each once and in its order."""
        if not isinstance(self.problems, FiniteProblems):
            raise UserError(
                f"data.problems: {type(self.problems).__name__} never ends, so predict cannot answer all of it. Use a "
                "finite source, such as egspo_lightning.data.jsonl.JsonlProblems."
            )
        sampling = Sampling(self.max_completion_length, temperature=0.0)
        return _loader(problem_batches("predict", self.problems.load(), 1, sampling, **self._evaluation_share))

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Problems are text: there is nothing to move, and Lightning refuses their frozen ``Sampling``."""
        return (
            batch
            if isinstance(batch, ProblemBatch)
            else super().transfer_batch_to_device(batch, device, dataloader_idx)
        )

    def benchmark_batches(self, benchmark: Benchmark) -> list[ProblemBatch]:
        """This rank's share of a benchmark."""
        length = benchmark.max_completion_length or self.max_completion_length
        self._require_positions(length)
        sampling = Sampling(length, benchmark.temperature, benchmark.top_p)
        problems = self._benchmark_problems[benchmark.name]
        return problem_batches(benchmark.name, problems, benchmark.num_samples, sampling, **self._evaluation_share)

    def answer(self, batch: ProblemBatch) -> list[Completion]:
        """Sample and grade the completions of a batch of problems."""
        prompts = [self._prompt(problem, f"{batch.benchmark}/{problem.id}") for problem in batch.problems]
        return complete(self._policy, self.engine, self._eval_reward, prompts, batch.num_samples, batch.sampling)

    # Both

    def _prompt(self, problem: Problem, stream: str) -> Prompt:
        """A problem as ids, with a random stream of its own."""
        return Prompt(problem, self._encoder.encode(problem), f"{self.seed}/{stream}")

    @property
    def _encoder(self) -> PromptEncoder:
        return PromptEncoder(self.prompt, self._policy.tokenizer, self.max_prompt_length)

    @property
    def _policy(self) -> RolloutPolicy:
        return self._trainer.lightning_module  # type: ignore[return-value]

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None, "no trainer is attached"
        return self.trainer

    @property
    def _expert_pool(self) -> ExpertPool:
        assert self._expert is not None, "setup has not run"
        return self._expert

    @property
    def _parts(self) -> int:
        """Micro-batches an update, on each rank."""
        return self._trainer.accumulate_grad_batches

    @property
    def _share(self) -> tuple[int, int, int]:
        return self._trainer.global_rank, self._trainer.world_size, self._parts

    @property
    def _evaluation_share(self) -> dict[str, int]:
        return {
            "rank": self._trainer.global_rank,
            "world_size": self._trainer.world_size,
            "batch_size": self.eval_batch_size,
        }

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """How far the streams of data have been drawn."""
        return {"num_passes": self.num_passes, "num_collections": self.num_collections}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where they were."""
        self.num_passes, self.num_collections = state_dict["num_passes"], state_dict["num_collections"]


def _loader(batches: list[ProblemBatch]) -> SizedLoader:
    """Batches as a loader; Lightning would take a list of batches for a list of loaders."""
    return SizedLoader(len(batches), lambda: iter(batches))


def _require(holds: bool, field: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"data.{field} must be {allowed}, got {value}.")
