"""The LightningDataModule: alternates between expert data and freshly sampled rollouts.

All sizes in its config are global: those of one optimizer step, or of one collection, over all ranks and accumulated
micro-batches. More ranks, ``--trainer.accumulate_grad_batches`` or ``max_tokens_per_micro_batch`` change speed and
memory, never the update.
"""

from typing import Any

from jsonargparse.typing import lazy_instance
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from egspo_lightning.data.expert_pool import ExpertPool
from egspo_lightning.data.prompts import PromptTemplate
from egspo_lightning.data.sized_loader import SizedLoader
from egspo_lightning.data.sources import DemonstrationSource, ProblemSource
from egspo_lightning.data.training_data import LongProblems, PromptEncoder, load_demonstrations, prepare_problems
from egspo_lightning.errors import UserError, require
from egspo_lightning.evaluation.answer_records import Answer
from egspo_lightning.evaluation.answer_sampling import GREEDY, AnswerSampling
from egspo_lightning.evaluation.answerer import PREDICT, Answerer, Share
from egspo_lightning.evaluation.benchmarks import Benchmark
from egspo_lightning.rewards.composition import WeightedReward
from egspo_lightning.rewards.functions import CorrectnessReward, Reward
from egspo_lightning.rewards.grading import MathGrader
from egspo_lightning.rollout.collector import Collector
from egspo_lightning.rollout.engine import ClosingEngine, RolloutEngine
from egspo_lightning.rollout.policy_protocol import TrainedPolicy
from egspo_lightning.rollout.scoring import CollectedRollouts
from egspo_lightning.rollout.transformers_engine import TransformersEngine
from egspo_lightning.training.fit_loop import count_epochs, forget
from egspo_lightning.training.micro_batches import longest_row
from egspo_lightning.training.rollout_phase import Phases, PhaseSizes, Split
from egspo_lightning.training.trainer_flags import require_budget, require_phases
from egspo_lightning.types import ExpertSolution, ProblemBatch

MOST = 10**8
"""Of anything that is counted in memory: far above what fits, and below what would hang before it fails."""


class HybridDataModule(LightningDataModule):
    """Gives a pass of demonstrations in stage SFT, and in stage EGSPO a fresh collection of rollouts an epoch.

    Args:
        demonstrations: Expert solutions.
        problems: Problems to sample rollouts for; those that also stand in a benchmark are dropped and counted.
        benchmarks: What MathBenchmark, validate and test measure.
        engine: Samples completions.
        reward: Scores completions in training; several at once with WeightedReward. What counts as right for
            rollout/accuracy is the grader's affair, whatever the reward.
        prompt: How a problem is put to the model.
        sft_batch_size: Demonstrations an update in stage SFT.
        expert_batch_size: Demonstrations that an update in stage EGSPO carries where mu > 0.
        num_problems: Problems a rollout collection.
        num_generations: Completions a problem.
        expert_fraction: Share of a collection's problems, in [0, 1], that come from the demonstrations; the expert's
            solution then stands beside the policy's completions as an off-policy sample (LUFFY).
        max_resampling: Rounds at most in which groups whose rewards are all equal are replaced by those of other
            problems (DAPO's dynamic sampling); 0 keeps them, and skips them in updates.
        num_ppo_epochs: Passes over a collection.
        num_minibatches: Updates a pass.
        max_tokens_per_micro_batch: Tokens of prompts and completions in one forward and backward pass on a device at
            most, to which a packed pass adds little padding; each phase then has the fewest micro-batches an update
            that keep it, cut in the order of their lengths. null takes the number of trainer.accumulate_grad_batches.
        max_staleness: Collections that the policy that samples may be behind the one in training: 0 samples, then
            trains; 1 samples the next collection in a thread while this one is trained on.
        max_prompt_length: Longest prompt in tokens; a demonstration with a longer one is dropped.
        long_problems: What becomes of training problems with longer prompts: "error", or "drop", which counts them.
        max_completion_length: Longest completion in tokens, EOS included; longer demonstrations are dropped.
        eval_batch_size: Problems answered at a time in evaluation, on each rank.
        evaluation_grader: Says which answers are right in validate, test, predict and MathBenchmark.
        predict_sampling: How predict answers problems; greedily and once by default.
        seed: Order of the data and random streams of the rollouts; the command line sets it to seed_everything.
    """

    def __init__(
        self,
        demonstrations: DemonstrationSource,
        problems: ProblemSource,
        benchmarks: list[Benchmark] | None = None,
        engine: RolloutEngine = lazy_instance(TransformersEngine, max_batch_size=256),  # noqa: B008
        reward: Reward = lazy_instance(CorrectnessReward),  # noqa: B008
        prompt: PromptTemplate = PromptTemplate(),  # noqa: B008  frozen, so it can be shared
        sft_batch_size: int = 64,
        expert_batch_size: int = 16,
        num_problems: int = 16,
        num_generations: int = 8,
        expert_fraction: float = 0.0,
        max_resampling: int = 0,
        num_ppo_epochs: int = 1,
        num_minibatches: int = 1,
        max_tokens_per_micro_batch: int | None = None,
        max_staleness: int = 0,
        max_prompt_length: int = 512,
        max_completion_length: int = 1024,
        long_problems: LongProblems = "error",
        eval_batch_size: int = 128,
        evaluation_grader: MathGrader = lazy_instance(MathGrader),  # noqa: B008
        predict_sampling: AnswerSampling = GREEDY,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.demonstrations, self.problems, self.benchmarks = demonstrations, problems, benchmarks or []
        self.engine, self.reward, self.prompt = engine, WeightedReward.of(reward), prompt
        self.sft_batch_size, self.expert_batch_size = sft_batch_size, expert_batch_size
        self.num_problems, self.num_generations = num_problems, num_generations
        self.expert_fraction = expert_fraction
        self.num_ppo_epochs, self.num_minibatches = num_ppo_epochs, num_minibatches
        self.max_resampling, self.max_staleness = max_resampling, max_staleness
        self.max_prompt_length, self.max_completion_length = max_prompt_length, max_completion_length
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.eval_batch_size, self.seed, self.long_problems = eval_batch_size, seed, long_problems
        for name, value in vars(self).items():
            if name in ("num_ppo_epochs", "num_minibatches", "max_prompt_length") or name.endswith("_batch_size"):
                require(value >= 1, f"data.{name}", value, "at least 1")
            if value is not None and (name.startswith(("num_", "max_")) or name.endswith("_batch_size")):
                require(value <= MOST, f"data.{name}", value, f"at most {MOST}")
        allowed = "0, or 1: one snapshot of the policy samples while it trains, so rollouts are one collection old"
        require(max_staleness in (0, 1), "data.max_staleness", max_staleness, allowed)
        require(0 <= expert_fraction <= 1, "data.expert_fraction", expert_fraction, "in [0, 1]")
        num_experts = round(expert_fraction * num_problems)
        allowed = f"0, or large enough to be at least one of the {num_problems} problems of data.num_problems"
        require(num_experts > 0 or expert_fraction == 0, "data.expert_fraction", expert_fraction, allowed)
        self.num_duplicates = 0
        """Training problems and demonstrations that a benchmark asks; they are dropped."""
        self.answerer = Answerer(
            self.benchmarks, engine, evaluation_grader, predict_sampling, max_completion_length, seed
        )
        collector = Collector(
            engine=engine,
            reward=self.reward,
            draw=problems.draw,
            draw_experts=self._draw_experts,
            encode=lambda problem: self.encoder.encode(problem),
            num_problems=num_problems,
            num_experts=num_experts,
            num_generations=num_generations,
            max_completion_length=max_completion_length,
            max_resampling=max_resampling,
            seed=seed,
        )
        sizes = PhaseSizes(
            sft_batch_size, expert_batch_size, num_ppo_epochs, num_minibatches, max_tokens_per_micro_batch
        )
        self.phases = Phases(collector, sizes, seed)

    # Set-up

    def setup(self, stage: str) -> None:
        """Load what the run needs; drop what training shares with a benchmark."""
        self.answerer.load(self.encoder)
        if stage == TrainerFn.PREDICTING:
            self.answerer.load_questions(self.problems)
        if stage == TrainerFn.FITTING:
            count_epochs(self._trainer)
            require_phases(self._trainer, finds_parts=self.max_tokens_per_micro_batch is not None)
            self.require_budget(self._trainer.accumulate_grad_batches, is_mixed=self._policy.mixes_expert_data)
            self._require_groups()
            self._require_ranks_apart()
            self._policy.accept_staleness(self.max_staleness)
            if self.phases.pool is None:
                self._load_training_data()

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
            f"Data: {len(pool.demonstrations)} demonstrations (dropped: {num_asked} that a benchmark asks, "
            f"{pool.num_dropped} that are too long). Training problems dropped because a benchmark asks them: "
            f"{dropped[0]}; because they are too long: {dropped[1]}."
        )

    def require_budget(self, parts: int, *, is_mixed: bool) -> None:
        """Refuse a budget of tokens that cannot be kept, or stands beside a number of micro-batches.

        Args:
            parts: trainer.accumulate_grad_batches
            is_mixed: whether updates on rollouts carry demonstrations as well
        """
        if self.max_tokens_per_micro_batch is not None:
            longest = longest_row(self.max_prompt_length, self.max_completion_length, is_mixed=is_mixed)
            require_budget(self.max_tokens_per_micro_batch, longest, parts)

    def _require_groups(self) -> None:
        """Refuse what the ranks cannot share, and what the advantage estimator cannot use."""
        least, ranks = self._policy.min_generations, self._trainer.world_size
        allowed = f"at least {least} with this model.advantage, which compares the completions of a group"
        require(self.num_generations >= least, "data.num_generations", self.num_generations, allowed)
        if self.expert_fraction > 0 and not self._policy.takes_expert_rollouts:
            raise UserError(
                f"data.expert_fraction = {self.expert_fraction} puts experts' solutions among the rollouts, which "
                "model.advantage cannot credit. Set expert_fraction to 0, or choose GroupRelative or LeaveOneOut."
            )
        allowed = f"a multiple of the {ranks} ranks, which share the problems evenly"
        require(self.num_problems % ranks == 0, "data.num_problems", self.num_problems, allowed)
        most = self.num_problems * self.num_generations // ranks
        allowed = f"at most {most}, the completions that each rank has"
        require(self.num_minibatches <= most, "data.num_minibatches", self.num_minibatches, allowed)

    def _require_ranks_apart(self) -> None:
        """Refuse what ranks would have to settle in a thread while their main threads talk about gradients."""
        ranks = self._trainer.world_size
        if self.max_staleness > 0 and self.max_resampling > 0 and ranks > 1:
            raise UserError(
                f"data.max_resampling = {self.max_resampling} has {ranks} ranks agree in each round on the groups to "
                f"replace, which they cannot while they train, as data.max_staleness = {self.max_staleness} asks for. "
                "Set one of them to 0, or use one rank."
            )

    def teardown(self, stage: str) -> None:
        """End sampling ahead, the graders' processes, and what the engine holds."""
        self.answerer.close()
        forget(self._trainer)
        self._end_sampling()
        if isinstance(self.engine, ClosingEngine):
            self.engine.close()

    def on_exception(self, exception: BaseException) -> None:
        """No thread outlives the run, whatever has ended it."""
        forget(self._trainer)
        self._end_sampling()

    def _end_sampling(self) -> None:
        self.phases.ahead.cancel()
        self.reward.close()  # a thread that waits for grades has an error instead
        self.phases.drop_ahead()
        self.reward.close()  # it may have started new workers before it ended

    # Training

    def train_dataloader(self) -> SizedLoader:
        """The loader of the coming epoch, by the policy's stage."""
        self.encoder.require_positions(self.max_completion_length, self._policy.max_positions)
        for benchmark in self.benchmarks:  # now rather than when the first is measured, perhaps after all of SFT
            self._require_positions(benchmark.name)
        return self.phases.loader(self._policy, self._split, looks_ahead=self.max_staleness > 0 and self._is_followed)

    @property
    def _is_followed(self) -> bool:
        """Whether a phase comes after the one whose loader is asked for, as far as it can be known."""
        trainer = self._trainer
        steps = trainer.global_step + self.num_ppo_epochs * self.num_minibatches
        has_epochs = trainer.max_epochs in (None, -1) or trainer.current_epoch + 1 < trainer.max_epochs
        return has_epochs and (trainer.max_steps == -1 or steps < trainer.max_steps)

    def _draw_experts(self, start: int, count: int) -> list[ExpertSolution]:
        """Demonstrations that stand among rollouts, from an endless order of their own."""
        return self._pool.solutions(start, count) if count else []

    # Evaluation

    def val_dataloader(self) -> list[SizedLoader]:
        """The benchmarks, one loader each; in fit MathBenchmark asks for them when it wants them."""
        return [] if self._trainer.state.fn == TrainerFn.FITTING else self.test_dataloader()

    def test_dataloader(self) -> list[SizedLoader]:
        """The benchmarks, one loader each."""
        require(bool(self.benchmarks), "data.benchmarks", "none", "at least one, or there is nothing to measure")
        return [_loader(self.benchmark_batches(benchmark)) for benchmark in self.benchmarks]

    def predict_dataloader(self) -> SizedLoader:
        """The problems of a finite source, each once and in its order."""
        return _loader(self._share_of(PREDICT))

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Problems are text: there is nothing to move, and Lightning refuses their frozen ``Sampling``."""
        if isinstance(batch, ProblemBatch):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def benchmark_batches(self, benchmark: Benchmark) -> list[ProblemBatch]:
        """This rank's share of a benchmark."""
        return self._share_of(benchmark.name)

    def answer(self, batch: ProblemBatch) -> list[Answer]:
        """Sample and grade the answers to a batch of problems, by an engine that is free or bears company."""
        if not getattr(self.engine, "is_reentrant", False):
            self.phases.ahead.packed()
        return self.answerer.answer(self._policy, self.encoder, batch)

    def _share_of(self, name: str) -> list[ProblemBatch]:
        self._require_positions(name)
        share = Share(self._trainer.global_rank, self._trainer.world_size, self.eval_batch_size)
        return self.answerer.batches(name, share)

    def _require_positions(self, name: str) -> None:
        """Refuse answers, to a benchmark or to the user, that are longer than the model was made for."""
        if name == PREDICT:
            field = "data.predict_sampling.max_completion_length"
        else:
            field = f"max_completion_length of benchmark {name!r}"
        _, sampling = self.answerer.sampling(name)
        self.encoder.require_positions(sampling.max_completion_length, self._policy.max_positions, field)

    # What belongs to the run

    @property
    def encoder(self) -> PromptEncoder:
        """Problems to ids, as this run puts them."""
        return PromptEncoder(self.prompt, self._policy.tokenizer, self.max_prompt_length)

    @property
    def _policy(self) -> TrainedPolicy:
        return self._trainer.lightning_module  # type: ignore[return-value]

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None, "no trainer is attached"
        return self.trainer

    @property
    def _pool(self) -> ExpertPool:
        assert self.phases.pool is not None, "setup has not run"
        return self.phases.pool

    @property
    def _split(self) -> Split:
        return Split(self._trainer.global_rank, self._trainer.world_size, self._trainer.accumulate_grad_batches)

    # How far training has come

    @property
    def rollouts(self) -> CollectedRollouts | None:
        """The latest rollouts of this rank, for callbacks to look at."""
        return self.phases.rollouts

    @property
    def num_passes(self) -> int:
        """Passes over the demonstrations, in stage SFT, begun in this run."""
        return self.phases.num_passes

    @property
    def num_rollout_batches(self) -> int:
        """Collections of rollouts that were sampled in this run."""
        return self.phases.num_rollout_batches

    def state_dict(self) -> dict[str, Any]:
        """Where the streams of data stand, and the rollouts of a phase that is under way. Collective."""
        progress: Any = self._trainer.fit_loop.epoch_progress.current
        return self.phases.state_dict(self._policy, is_running=progress.ready > progress.processed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where they were; to measure a checkpoint, it does not matter."""
        if self._trainer.state.fn == TrainerFn.FITTING:
            rank, ranks = self._trainer.global_rank, self._trainer.world_size
            self.phases.load_state_dict(state_dict, rank, ranks, looks_ahead=self.max_staleness > 0)
            if state_dict.get("ahead") and not self.phases.ahead.is_there:
                rank_zero_info(
                    "The checkpoint holds rollouts that were sampled ahead, on another number of ranks or with another "
                    "data.max_staleness: their problems are sampled anew."
                )


def _loader(batches: list[ProblemBatch]) -> SizedLoader:
    """Batches as a loader; Lightning would take a list of batches for a list of loaders."""
    return SizedLoader(len(batches), lambda: iter(batches))
