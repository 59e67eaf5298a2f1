"""The LightningDataModule: alternates between expert demonstrations and freshly sampled rollouts.

All sizes in its config are global: of one optimizer step or one rollout batch, over all ranks and accumulated
micro-batches. More ranks, ``--trainer.accumulate_grad_batches`` or ``max_tokens_per_micro_batch`` change speed and
memory. The optimizer step stays the same up to rounding.
"""

from typing import Any, Literal

from jsonargparse.typing import lazy_instance
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from egspo_lightning.data.prompts import PromptEncoder, PromptTemplate
from egspo_lightning.data.sized_loader import SizedLoader
from egspo_lightning.data.sources import DemonstrationSource, ProblemSource
from egspo_lightning.data.training_data import LongProblems, load_demonstrations, prepare_problems
from egspo_lightning.errors import require
from egspo_lightning.evaluation.answerer import PREDICT, Answerer
from egspo_lightning.evaluation.answers import GREEDY, Answer, AnswerSampling
from egspo_lightning.evaluation.benchmarks import Benchmark
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.functions import CorrectnessReward, Reward
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rollout.collector import Collector
from egspo_lightning.rollout.engine import ClosingEngine, RolloutEngine
from egspo_lightning.rollout.policy_protocol import TrainedPolicy
from egspo_lightning.rollout.rollout_records import CollectedRollouts
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.training.fit_loop import restore_accumulation, resume_with_next_epoch
from egspo_lightning.training.lazy_defaults import instantiate_lazy_default
from egspo_lightning.training.rollout_phase import Phases, PhaseSizes, Process
from egspo_lightning.training.setup_rules import require_positions, require_run
from egspo_lightning.types import Count, NonNegativeInt, ProblemBatch, UnitInterval


class HybridDataModule(LightningDataModule):
    """Gives an SFT pass over the demonstrations in stage SFT, and a fresh rollout batch each epoch in stage EGSPO.

    Args:
        demonstrations: Expert solutions.
        problems: Problems to sample rollouts for. Problems that a benchmark contains are dropped and counted.
        benchmarks: Benchmarks for MathBenchmark, validate and test.
        engine: Samples completions.
        reward: Scores completions in training; combine several with WeightedReward. The grader alone decides
            rollout/accuracy.
        prompt: Template of the prompt for a problem.
        sft_batch_size: Demonstrations of an optimizer step in stage SFT.
        expert_batch_size: Demonstrations of an optimizer step in stage EGSPO, where mu > 0.
        num_problems: Problems of a rollout batch.
        num_generations: Completions of each problem.
        expert_fraction: Share of the problems of a rollout batch that come from the demonstrations. Their groups also
            hold the expert's solution, as an off-policy sample (LUFFY).
        max_resampling: Maximum number of rounds that replace flat groups, whose rewards are all equal, by groups of
            other problems (DAPO's dynamic sampling). 0 keeps flat groups.
        num_ppo_epochs: Passes over a rollout batch.
        num_minibatches: Optimizer steps of a pass.
        max_tokens_per_micro_batch: Token budget, prompts and completions, of one forward and backward pass on a device.
            Padding is not counted; a packed pass adds little. Each phase uses the fewest micro-batches within the
            budget, split by length. null takes their number from trainer.accumulate_grad_batches.
        max_staleness: Maximum lag of the sampling policy, in rollout batches. 0 samples, then trains. 1 samples the
            next rollout batch in a thread while the policy trains on this one.
        max_prompt_length: Longest prompt in tokens; demonstrations with longer ones are dropped.
        long_problems: For training problems with longer prompts: "error", or "drop" to drop and count them.
        max_completion_length: Longest completion in tokens, EOS included; longer demonstrations are dropped.
        eval_batch_size: Problems answered at a time in evaluation, on each rank.
        evaluation_grader: Grades answers in validate, test, predict and MathBenchmark.
        predict_sampling: How predict samples answers; greedily and once by default.
        seed: Seed of the data order and the rollouts; the command line sets it to seed_everything.
    """

    def __init__(
        self,
        demonstrations: DemonstrationSource,
        problems: ProblemSource,
        benchmarks: list[Benchmark] | None = None,
        engine: RolloutEngine = lazy_instance(TransformersEngine, max_batch_size=256),  # noqa: B008
        reward: Reward = lazy_instance(CorrectnessReward),  # noqa: B008
        prompt: PromptTemplate = PromptTemplate(),  # noqa: B008  frozen, so it can be shared
        sft_batch_size: Count = 64,
        expert_batch_size: Count = 16,
        num_problems: Count = 16,
        num_generations: Count = 8,
        expert_fraction: UnitInterval = 0.0,
        max_resampling: NonNegativeInt = 0,
        num_ppo_epochs: Count = 1,
        num_minibatches: Count = 1,
        max_tokens_per_micro_batch: Count | None = None,
        max_staleness: Literal[0, 1] = 0,
        max_prompt_length: Count = 512,
        max_completion_length: Count = 1024,
        long_problems: LongProblems = "error",
        eval_batch_size: Count = 128,
        evaluation_grader: MathGrader = lazy_instance(MathGrader),  # noqa: B008
        predict_sampling: AnswerSampling = GREEDY,
        seed: int = 0,
    ) -> None:
        super().__init__()
        engine, reward = instantiate_lazy_default(engine), instantiate_lazy_default(reward)
        evaluation_grader = instantiate_lazy_default(evaluation_grader)
        self.demonstrations, self.problems, self.benchmarks = demonstrations, problems, benchmarks or []
        self.engine, self.reward, self.prompt = engine, WeightedReward.of(reward), prompt
        self.num_problems, self.num_generations = num_problems, num_generations
        self.expert_fraction, self.num_experts = expert_fraction, round(expert_fraction * num_problems)
        self.max_resampling, self.max_staleness = max_resampling, max_staleness
        self.num_ppo_epochs, self.num_minibatches = num_ppo_epochs, num_minibatches
        self.max_prompt_length, self.max_completion_length = max_prompt_length, int(max_completion_length)
        max_tokens = None if max_tokens_per_micro_batch is None else int(max_tokens_per_micro_batch)
        self.max_tokens_per_micro_batch = max_tokens
        self.sft_batch_size, self.expert_batch_size = sft_batch_size, expert_batch_size
        self.eval_batch_size, self.seed, self.long_problems = eval_batch_size, seed, long_problems
        self.num_duplicates = 0
        """Number of training problems and demonstrations that were dropped because a benchmark contains them."""
        self.answerer = Answerer(
            self.benchmarks, engine, evaluation_grader, predict_sampling, self.max_completion_length, seed
        )
        sizes = PhaseSizes(sft_batch_size, expert_batch_size, num_ppo_epochs, num_minibatches, max_tokens)
        self.phases = Phases(self._collector(), sizes, seed)

    def _collector(self) -> Collector:
        return Collector(
            engine=self.engine,
            reward=self.reward,
            draw=self.problems.draw,
            draw_experts=lambda start, count: self.phases.loaded_pool.solutions(start, count) if count else [],
            encode=lambda problem: self.encoder.encode(problem),
            num_problems=self.num_problems,
            num_experts=self.num_experts,
            num_generations=self.num_generations,
            max_completion_length=self.max_completion_length,
            max_resampling=self.max_resampling,
            seed=self.seed,
        )

    # Set-up

    def setup(self, stage: str) -> None:
        """Check the run's settings, and load its data; drop training data that a benchmark contains.

        Raises:
            UserError: settings do not fit together, or data cannot be read.
        """
        self.answerer.load(self.encoder)
        if stage == TrainerFn.PREDICTING:
            self.answerer.load_questions(self.problems)
        if stage == TrainerFn.FITTING:
            resume_with_next_epoch(self._trainer)
            require_run(self._trainer, self._policy, self)
            if self.phases.pool is None:
                self._load_training_data()
        module: Any = self._trainer.lightning_module
        require_positions(module.policy_config.max_positions(), self.max_prompt_length, self._completion_limits(stage))

    def _completion_limits(self, stage: str) -> list[tuple[str, int]]:
        """Completion length limits of a stage, as (config field, tokens)."""
        fields = {
            benchmark.name: f"max_completion_length of benchmark {benchmark.name!r}" for benchmark in self.benchmarks
        }
        if stage == TrainerFn.PREDICTING:
            fields = {PREDICT: "data.predict_sampling.max_completion_length"}
        limits = [(field, self.answerer.sampling(name)[1].max_completion_length) for name, field in fields.items()]
        trained = [("data.max_completion_length", self.max_completion_length)] if stage == TrainerFn.FITTING else []
        return trained + limits

    def _load_training_data(self) -> None:
        excluded, length = self.answerer.asked, self.max_completion_length
        pool, num_asked = load_demonstrations(
            self.demonstrations, self.encoder, excluded, max_completion_length=length, seed=self.seed
        )
        dropped = prepare_problems(
            self.problems, self.encoder, excluded, long_problems=self.long_problems, seed=self.seed
        )
        self.num_duplicates = num_asked + dropped[0]
        if self.expert_fraction > 0:
            pool.require_answers()
        self.phases.pool = pool
        rank_zero_info(
            f"Data: {len(pool.demonstrations)} demonstrations (dropped: {num_asked} that a benchmark contains, "
            f"{pool.num_dropped} that are too long). Training problems dropped because a benchmark contains them: "
            f"{dropped[0]}; because they are too long: {dropped[1]}."
        )

    def teardown(self, stage: str) -> None:
        """End sampling ahead, the graders' processes, and the engine."""
        self.answerer.grader.close()
        restore_accumulation(self._trainer)
        self._end_sampling()
        if isinstance(self.engine, ClosingEngine):
            self.engine.close()

    def on_exception(self, exception: BaseException) -> None:
        """End sampling ahead: no thread outlives the run."""
        restore_accumulation(self._trainer)
        self._end_sampling()

    def _end_sampling(self) -> None:
        self.phases.ahead.cancel()
        self.reward.close()  # unblocks a sampling thread that waits for grades
        self.phases.drop_ahead()
        self.reward.close()  # stops workers that the thread started meanwhile

    # Training

    def train_dataloader(self) -> SizedLoader:
        """The loader of the next phase, by the policy's stage."""
        num_micro_batches, samples_ahead = self._trainer.accumulate_grad_batches, self.max_staleness > 0
        return self.phases.loader(
            self._policy, self._process, num_micro_batches, samples_ahead=samples_ahead and self._has_next_phase
        )

    @property
    def _has_next_phase(self) -> bool:
        """Whether another phase follows the one whose loader is built. Ignores max_time and early stopping."""
        trainer = self._trainer
        steps = trainer.global_step + self.num_ppo_epochs * self.num_minibatches
        has_epochs = trainer.max_epochs in (None, -1) or trainer.current_epoch + 1 < trainer.max_epochs
        return has_epochs and (trainer.max_steps == -1 or steps < trainer.max_steps)

    # Evaluation

    def val_dataloader(self) -> list[SizedLoader]:
        """The benchmarks, one loader each; none in fit, where MathBenchmark evaluates."""
        return [] if self._trainer.state.fn == TrainerFn.FITTING else self.test_dataloader()

    def test_dataloader(self) -> list[SizedLoader]:
        """The benchmarks, one loader each."""
        require(bool(self.benchmarks), "data.benchmarks", "none", "at least one, or there is nothing to measure")
        return [_loader(self.benchmark_batches(benchmark)) for benchmark in self.benchmarks]

    def predict_dataloader(self) -> SizedLoader:
        """The problems of a finite source, once each, in order."""
        return _loader(self._share_of(PREDICT))

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Leave problems where they are: they are text, and Lightning refuses their frozen ``Sampling``."""
        if isinstance(batch, ProblemBatch):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def benchmark_batches(self, benchmark: Benchmark) -> list[ProblemBatch]:
        """This rank's share of a benchmark."""
        return self._share_of(benchmark.name)

    def answer(self, batch: ProblemBatch) -> list[Answer]:
        """Sample and grade answers to a batch of problems. Waits until the engine is free, unless it is re-entrant."""
        if not getattr(self.engine, "is_reentrant", False):
            self.phases.ahead.packed()
        return self.answerer.answer(self._policy, self.encoder, batch)

    def _share_of(self, name: str) -> list[ProblemBatch]:
        return self.answerer.batches(name, *self._process, self.eval_batch_size)

    # Parts of the run

    @property
    def encoder(self) -> PromptEncoder:
        """Encodes problems as this run's prompts."""
        return PromptEncoder(self.prompt, self._policy.tokenizer, self.max_prompt_length)

    @property
    def _policy(self) -> TrainedPolicy:
        return self._trainer.lightning_module  # type: ignore[return-value]

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None, "no trainer is attached"
        return self.trainer

    @property
    def _process(self) -> Process:
        return Process(self._trainer.global_rank, self._trainer.world_size)

    # Progress of training

    @property
    def rollouts(self) -> CollectedRollouts | None:
        """The latest rollout batch of this rank, for callbacks."""
        return self.phases.rollouts

    @property
    def num_passes(self) -> int:
        """Number of SFT passes started."""
        return self.phases.num_passes

    @property
    def num_rollout_batches(self) -> int:
        """Number of rollout batches started."""
        return self.phases.num_rollout_batches

    def state_dict(self) -> dict[str, Any]:
        """Data positions, the unfinished rollout batch and the one sampled ahead. Call it on all ranks."""
        progress: Any = self._trainer.fit_loop.epoch_progress.current
        return self.phases.state_dict(self._policy, is_running=progress.ready > progress.processed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the positions in the data; evaluation does not need them."""
        if self._trainer.state.fn == TrainerFn.FITTING:
            self.phases.load_state_dict(state_dict, self._process, samples_ahead=self.max_staleness > 0)
            if state_dict.get("ahead") and not self.phases.ahead.is_there:
                rank_zero_info(
                    "The checkpoint holds rollouts that were sampled ahead on another number of ranks or with another "
                    "data.max_staleness. They are dropped, and their problems are sampled again."
                )


def _loader(batches: list[ProblemBatch]) -> SizedLoader:
    """A loader of given batches: Lightning would read a plain list as several loaders."""
    return SizedLoader(len(batches), lambda: iter(batches))
