"""The LightningDataModule: SFT batches of expert demonstrations, then rollouts, mixed with demonstrations if mu > 0.

Batch sizes of training are global: of one optimizer step or one rollout batch, over all ranks and accumulated
micro-batches. More ranks, ``--trainer.accumulate_grad_batches`` or ``max_tokens_per_micro_batch`` change speed and
memory. The optimizer step stays the same up to rounding.
"""

from typing import Any, Literal

from jsonargparse.typing import lazy_instance
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from egspo_lightning.data.prompts import PromptEncoder, PromptTemplate
from egspo_lightning.data.sized_loader import SizedLoader
from egspo_lightning.data.sources import DemonstrationSource, ProblemSource
from egspo_lightning.data.training_data import LongProblems, load_demonstrations, match_columns, prepare_problems
from egspo_lightning.errors import require
from egspo_lightning.evaluation.answerer import PREDICT, Answerer
from egspo_lightning.evaluation.answers import GREEDY, Answer, AnswerSampling
from egspo_lightning.evaluation.benchmarks import Benchmark
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.functions import CorrectnessReward, Reward
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rollout.collector import Collector
from egspo_lightning.rollout.engine import ClosingEngine, RolloutEngine, SelectiveEngine, StartingEngine
from egspo_lightning.rollout.policy_protocol import TrainedPolicy
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.training.callback_rules import reaches_egspo
from egspo_lightning.training.fit_loop import begins_run, reload_every_epoch, resume_with_next_epoch
from egspo_lightning.training.lazy_defaults import instantiate_lazy_default
from egspo_lightning.training.rollout_phase import Phases
from egspo_lightning.training.setup_rules import require_positions, require_run
from egspo_lightning.training.start_probe import probe_policy
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
            Padding is not counted; packed passes have little of it. Each phase uses the fewest micro-batches within the
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

    trainer: Trainer  # Lightning attaches it before it calls any hook
    phases: Phases
    """Progress of training, and the latest rollout batch of this rank."""

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
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch and int(max_tokens_per_micro_batch)
        self.sft_batch_size, self.expert_batch_size = sft_batch_size, expert_batch_size
        self.eval_batch_size, self.seed, self.long_problems = eval_batch_size, seed, long_problems
        self._is_probed = False
        self.num_duplicates = 0
        """Number of training problems and demonstrations that were dropped because a benchmark contains them."""
        self.answerer = Answerer(
            self.benchmarks, engine, evaluation_grader, predict_sampling, self.max_completion_length, seed
        )
        self.start_run()

    def start_run(self) -> None:
        """Set all state of a run to its beginning; a checkpoint is loaded later."""
        sizes = self.sft_batch_size, self.expert_batch_size, self.num_ppo_epochs, self.num_minibatches
        self.phases = Phases(self._collector(), *sizes, self.max_tokens_per_micro_batch, self.seed)

    def _collector(self) -> Collector:
        return Collector(
            engine=self.engine,
            reward=self.reward,
            draw=self.problems.draw,
            draw_experts=lambda start, count: self.phases.pool.solutions(start, count) if count else [],
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

        Each fit reads and encodes the data anew: another module may have another tokenizer.

        Raises:
            UserError: settings do not fit together, or data cannot be read.
        """
        self._require_engine(stage)
        self.answerer.load(self.encoder)
        if stage == TrainerFn.PREDICTING:
            self.answerer.load_questions(self.problems)
        if stage == TrainerFn.FITTING:
            self._is_probed = False
            resume_with_next_epoch(self.trainer)
            reload_every_epoch(self.trainer)
            require_run(self.trainer, self._policy, self)
            if begins_run(self.trainer):
                self.start_run()
            self.phases.rank, self.phases.world_size = self.trainer.global_rank, self.trainer.world_size
            self._load_training_data()
        module: Any = self.trainer.lightning_module
        require_positions(module.policy_config.max_positions(), self.max_prompt_length, self._completion_limits(stage))

    def _require_engine(self, stage: str) -> None:
        """Refuse an engine that does not fit the ranks, the model or sampling ahead."""
        if isinstance(self.engine, SelectiveEngine):
            module: Any = self.trainer.lightning_module
            max_staleness = self.max_staleness if stage == TrainerFn.FITTING else 0
            self.engine.require_run(self.trainer.world_size, module.policy_config.num_heads(), max_staleness)

    def _completion_limits(self, stage: str) -> dict[str, int]:
        """Completion length limits of a stage, in tokens, by config field."""
        fields = {b.name: f"max_completion_length of benchmark {b.name!r}" for b in self.benchmarks}
        if stage == TrainerFn.PREDICTING:
            fields = {PREDICT: "data.predict_sampling.max_completion_length"}
        trained = {"data.max_completion_length": self.max_completion_length} if stage == TrainerFn.FITTING else {}
        return trained | {f: self.answerer.sampling(name)[1].max_completion_length for name, f in fields.items()}

    def _load_training_data(self) -> None:
        excluded = self.answerer.asked
        if self.reward.columns != frozenset():  # else a source keeps its class's default
            self.problems.reward_columns = self.reward.columns
            if self.num_experts:
                self.demonstrations.reward_columns = self.reward.columns
        pool, num_asked = load_demonstrations(
            self.demonstrations,
            self.encoder,
            excluded,
            max_completion_length=self.max_completion_length,
            seed=self.seed,
            grader=self.reward.grader,
            needs_answers=self.reward.needs_answers and reaches_egspo(self.trainer, self._policy.initial_stage),
        )
        dropped = prepare_problems(
            self.problems, self.encoder, excluded, long_problems=self.long_problems, seed=self.seed
        )
        self.num_duplicates = num_asked + dropped[0]
        if self.expert_fraction > 0:
            pool.require_answers()
        self.phases.pool = pool
        if pool.warning is not None:
            rank_zero_warn(pool.warning)
        if reaches_egspo(self.trainer, self._policy.initial_stage):
            experts = [item.demonstration for item in pool.demonstrations] if self.num_experts else []
            for fact in match_columns(self.reward, self.problems, self.demonstrations, experts):
                rank_zero_info(fact)
        rank_zero_info(
            f"Data: {len(pool.demonstrations)} demonstrations (dropped: {num_asked} that a benchmark contains, "
            f"{pool.num_dropped} that are too long, {pool.num_wrong} that the grader marks wrong; without an answer: "
            f"{pool.num_unanswered}). Training problems dropped because a benchmark contains them: {dropped[0]}; "
            f"because they are too long: {dropped[1]}."
        )

    def _start_engine(self) -> None:
        """Start the engine on all ranks, in their main threads: one that starts alone would wait for the others."""
        if isinstance(self.engine, StartingEngine):
            with self._policy.sampling(whole=False) as lm:
                self.engine.start(lm)

    def teardown(self, stage: str) -> None:
        """End sampling ahead, the graders' processes, and the engine."""
        self.answerer.grader.close()
        self._end_training()
        self._close_engine()

    def on_exception(self, exception: BaseException) -> None:
        """End sampling ahead and the engine: no thread outlives the run, and no engine the process group."""
        self._end_training()
        self._close_engine()

    def _close_engine(self) -> None:
        if isinstance(self.engine, ClosingEngine):
            self.engine.close()

    def _end_training(self) -> None:
        if self.max_tokens_per_micro_batch is not None and hasattr(self.phases, "pool"):
            self.trainer.accumulate_grad_batches = 1  # the user's value; phases with a token budget change it
        self.phases.ahead.cancel()
        self.reward.close()  # unblocks a sampling thread that waits for grades
        self.phases.drop_ahead()
        self.reward.close()  # stops workers that the thread started meanwhile

    # Training

    def train_dataloader(self) -> SizedLoader:
        """The loader of the next phase, by the policy's stage; the first one of a run comes after the start probe."""
        if not self._is_probed:
            lengths = {"max_prompt_length": self.max_prompt_length, "max_completion_length": self.max_completion_length}
            probe_policy(self._policy, self.engine, **lengths)
            self._start_engine()
            self._is_probed = True
        samples_ahead, number = self.max_staleness > 0 and self._has_next_phase, self.trainer.accumulate_grad_batches
        return self.phases.loader(self._policy, number, samples_ahead=samples_ahead)

    @property
    def _has_next_phase(self) -> bool:
        """Whether another phase follows the one whose loader is built. Ignores max_time and early stopping."""
        max_epochs, max_steps = self.trainer.max_epochs, self.trainer.max_steps
        num_steps = self.trainer.global_step + self.num_ppo_epochs * self.num_minibatches
        has_epochs = max_epochs is None or max_epochs == -1 or self.trainer.current_epoch + 1 < max_epochs
        return has_epochs and (max_steps == -1 or num_steps < max_steps)

    # Evaluation

    def val_dataloader(self) -> list[SizedLoader]:
        """The benchmarks, one loader each; none in fit, where MathBenchmark evaluates."""
        return [] if self.trainer.state.fn == TrainerFn.FITTING else self.test_dataloader()

    def test_dataloader(self) -> list[SizedLoader]:
        """The benchmarks, one loader each."""
        require(bool(self.benchmarks), "data.benchmarks", "none", "at least one, or there is nothing to measure")
        self._start_engine()
        return [self.problems_of(benchmark.name) for benchmark in self.benchmarks]

    def predict_dataloader(self) -> SizedLoader:
        """The problems of a finite source, once each, in order."""
        self._start_engine()
        return self.problems_of(PREDICT)

    def problems_of(self, name: str) -> SizedLoader:
        """This rank's share of a benchmark, or of the problems of predict, as batches."""
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        batches = self.answerer.batches(name, rank, world_size, self.eval_batch_size)
        return SizedLoader(len(batches), lambda: iter(batches))  # Lightning would read a list as several loaders

    def answer(self, batch: ProblemBatch) -> list[Answer]:
        """Sample and grade answers to a batch of problems. Waits until the engine is free, unless it is re-entrant."""
        if not getattr(self.engine, "is_reentrant", False):
            self.phases.ahead.packed()
        return self.answerer.answer(self._policy, self.encoder, batch)

    # Parts of the run

    @property
    def encoder(self) -> PromptEncoder:
        """Encodes problems as this run's prompts."""
        return PromptEncoder(self.prompt, self._policy.tokenizer, self.max_prompt_length)

    @property
    def _policy(self) -> TrainedPolicy:
        return self.trainer.lightning_module  # type: ignore[return-value]

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Data positions, the unfinished rollout batch and the one sampled ahead. Call it on all ranks."""
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        return self.phases.state_dict(self._policy, is_running=progress.ready > progress.processed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the positions in the data; evaluation does not need them."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.phases.load_state_dict(state_dict, samples_ahead=self.max_staleness > 0)
