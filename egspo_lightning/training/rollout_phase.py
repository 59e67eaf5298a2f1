"""Training data pipeline: problems, rollouts, advantages, gate, optimizer steps, micro-batches.

A phase is one Lightning epoch: an SFT pass over the demonstrations, or one rollout batch with its PPO epochs and
minibatches. ``Phases.rollout_phase`` is the whole rollout phase in order. All ranks must call the methods
marked as collective.

The order of the data depends only on the seed and the phase's number, so a resumed run draws the same data. Only a
rollout batch that is being trained on, or was sampled ahead, must be in the checkpoint.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from egspo_lightning.checkpointing.mid_epoch import MidEpochPosition
from egspo_lightning.data.expert_pool import ExpertPool, ExpertShare
from egspo_lightning.data.sized_loader import SizedLoader
from egspo_lightning.rollout.collector import Collector
from egspo_lightning.rollout.policy_protocol import RolloutPolicy, TrainedPolicy
from egspo_lightning.rollout.rollout_records import CollectedRollouts, ScoredGroups, pack, unpack
from egspo_lightning.rollout.sampling_ahead import SamplingAhead
from egspo_lightning.rollout.scoring import completions_by_row, score
from egspo_lightning.training.micro_batches import StepShare, split_into_micro_batches
from egspo_lightning.training.minibatches import RolloutShare, plan_optimizer_steps, share_optimizer_steps
from egspo_lightning.types import Stage, TrainingBatch


@dataclass(frozen=True)
class PhaseSizes:
    """Sizes of the optimizer steps of a phase, over all ranks and micro-batches.

    Args:
        sft_batch_size: Demonstrations of an optimizer step in stage SFT.
        expert_batch_size: Demonstrations of an optimizer step in stage EGSPO, where mu > 0.
        num_ppo_epochs: Passes over a rollout batch.
        num_minibatches: Optimizer steps of a pass.
        max_tokens: Token budget of a micro-batch. The number of micro-batches then varies by phase. None takes it from
            trainer.accumulate_grad_batches.
    """

    sft_batch_size: int
    expert_batch_size: int
    num_ppo_epochs: int
    num_minibatches: int
    max_tokens: int | None = None


class Process(NamedTuple):
    """This process among the ranks of the run."""

    rank: int
    world_size: int


class Phases:
    """Makes the micro-batches of one phase after another.

    Args:
        collector: Draws problems, and samples and grades completions.
        sizes: How a phase is split into optimizer steps.
        seed: Seed of the order within a rollout batch.
    """

    def __init__(self, collector: Collector, sizes: PhaseSizes, seed: int) -> None:
        self.collector, self.sizes, self.seed = collector, sizes, seed
        self.num_passes = self.num_rollout_batches = 0
        """Number of SFT passes and of rollout batches started."""
        self.rollouts: CollectedRollouts | None = None
        """The latest rollout batch of this rank."""
        self.pool: ExpertPool | None = None
        """The demonstrations, once they are loaded."""
        self.ahead = SamplingAhead()
        """The next rollout batch, where it is sampled while this one is trained on."""
        self._num_drawn = 0  # problems used so far; collector.num_drawn also counts those sampled ahead
        self._progress = MidEpochPosition()
        self._saved: MidEpochPosition | None = None  # of a mid-epoch checkpoint, until its phase continues

    # The rollout phase, in stage EGSPO

    def rollout_phase(
        self, policy: TrainedPolicy, process: Process, saved: MidEpochPosition | None, samples_ahead: bool
    ) -> Iterator[TrainingBatch]:
        """Make a rollout batch, then give the micro-batches of each optimizer step on it.

        Args:
            policy: the policy in training
            process: this process among the ranks
            saved: position of a mid-epoch checkpoint whose phase continues
            samples_ahead: whether to sample the next rollout batch in a thread, from a snapshot of the current policy
        """
        if saved is None:
            scored = self.ahead.take(policy.device)
            if scored is None:
                scored = self.sample_and_score(policy, process, self.num_rollout_batches)
            self.rollouts = self.with_advantages_and_gate(policy, scored)
            self.num_rollout_batches += 1
            if samples_ahead:
                self.sample_next(policy, process)
        else:
            assert saved.rollouts is not None
            self.rollouts = unpack(CollectedRollouts, saved.rollouts, policy.device)
        rollout_shares = self.split_into_optimizer_steps(policy, self.rollouts)
        expert_shares = self.draw_demonstrations(policy, process, len(rollout_shares))
        steps = [StepShare(*pair) for pair in zip(rollout_shares, expert_shares, strict=True)]
        yield from self.micro_batches(policy, steps, saved)

    def sample_and_score(self, policy: RolloutPolicy, process: Process, number: int) -> ScoredGroups:
        """Sample, grade (``rollout.grade_rollouts``) and score rollout batch ``number``. Collective."""
        collector = self.collector
        drawn = collector.draw_problems(number, *process)
        graded = collector.sample_and_grade(policy, drawn.prompts)
        graded = collector.replace_flat_groups(policy, drawn, graded)
        graded = collector.grade_expert_solutions(policy, drawn, graded)
        rollouts, measurements = score(policy, graded, collector.max_completion_length)
        numbers = [group.number for group in graded.groups]
        return ScoredGroups(completions_by_row(graded.groups), rollouts, measurements, numbers, collector.num_drawn)

    def with_advantages_and_gate(self, policy: TrainedPolicy, scored: ScoredGroups) -> CollectedRollouts:
        """Turn scored rollouts into a rollout batch that can be trained on. Collective."""
        self._num_drawn = self.collector.num_drawn = scored.num_drawn
        return CollectedRollouts(
            completions=scored.completions,
            batch=policy.to_rollout_batch(scored.rollouts, scored.measurements),
            numbers=scored.numbers,
            expert_groups=scored.rollouts.expert_groups.tolist(),
        )

    def sample_next(self, policy: TrainedPolicy, process: Process) -> None:
        """Start a thread that samples the next rollout batch from a snapshot of the policy."""
        number = self.num_rollout_batches
        self.ahead.start(policy.snapshot(), lambda snapshot: self.sample_and_score(snapshot, process, number))

    def split_into_optimizer_steps(self, policy: TrainedPolicy, rollouts: CollectedRollouts) -> list[RolloutShare]:
        """This rank's rows of each optimizer step on the latest rollout batch. Collective."""
        plan = plan_optimizer_steps(
            rollouts.numbers,
            self.collector.num_generations,
            self.sizes.num_minibatches,
            self.sizes.num_ppo_epochs,
            seed=f"{self.seed}/{self.num_rollout_batches - 1}",
            expert_groups=rollouts.expert_groups,
        )
        keep, total = policy.needs_every_rollout, policy.sum_over_ranks
        return share_optimizer_steps(rollouts.batch, plan, keep_inactive=keep, total=total)

    def draw_demonstrations(
        self, policy: TrainedPolicy, process: Process, num_steps: int
    ) -> Sequence[ExpertShare | None]:
        """This rank's demonstrations of each optimizer step on the latest rollout batch; None where mu = 0."""
        if not policy.mixes_expert_data:
            return [None] * num_steps
        size, first = self.sizes.expert_batch_size, (self.num_rollout_batches - 1) * num_steps
        drawn = (self.loaded_pool.draw((first + i) * size, size) for i in range(num_steps))
        return [self.loaded_pool.share(demonstrations, *process) for demonstrations in drawn]

    # The SFT phase

    def sft_phase(
        self, policy: TrainedPolicy, process: Process, saved: MidEpochPosition | None
    ) -> Iterator[TrainingBatch]:
        """Give the micro-batches of one pass over the demonstrations; arguments as in ``rollout_phase``."""
        self.num_passes += saved is None
        size, count = self.sizes.sft_batch_size, len(self.loaded_pool.demonstrations)
        order = self.loaded_pool.draw((self.num_passes - 1) * count, count)
        batches = [order[start : start + size] for start in range(0, count, size)]
        steps = [StepShare(None, self.loaded_pool.share(demonstrations, *process)) for demonstrations in batches]
        yield from self.micro_batches(policy, steps, saved)

    # Either phase

    def loader(
        self, policy: TrainedPolicy, process: Process, num_micro_batches: int, *, samples_ahead: bool = False
    ) -> SizedLoader:
        """The loader of the next phase, by the policy's stage; it continues the phase of a mid-epoch checkpoint.

        Args:
            policy: the policy in training
            process: this process among the ranks
            num_micro_batches: micro-batches of each optimizer step, unless a token budget sets it
            samples_ahead: whether to sample the next rollout batch in a thread, from a snapshot of the policy at the
                start of this phase

        Raises:
            UserError: this config has a different number of optimizer steps or micro-batches than the checkpoint.
        """
        sizes, is_sft = self.sizes, policy.stage == Stage.SFT
        num_sft_steps = -(-len(self.loaded_pool.demonstrations) // sizes.sft_batch_size)
        num_steps = num_sft_steps if is_sft else sizes.num_ppo_epochs * sizes.num_minibatches
        saved, self._saved = self._saved, None
        self._progress = MidEpochPosition(num_micro_batches, num_steps * num_micro_batches, sizes.max_tokens)
        if saved is not None:
            self._progress = saved.resume(num_steps, num_micro_batches, sizes.max_tokens)
            if sizes.max_tokens is not None:  # Lightning needs the epoch length as soon as it has the loader
                policy.settle_micro_batches(self._progress.num_micro_batches, num_steps)
        if is_sft:
            return SizedLoader(self._progress.length, lambda: self.sft_phase(policy, process, saved))
        return SizedLoader(self._progress.length, lambda: self.rollout_phase(policy, process, saved, samples_ahead))

    def micro_batches(
        self, policy: TrainedPolicy, steps: Sequence[StepShare], saved: MidEpochPosition | None
    ) -> Iterator[TrainingBatch]:
        """Split optimizer steps into micro-batches, leaving out those before a saved position."""
        progress, max_tokens = self._progress, self.sizes.max_tokens
        if max_tokens is not None and saved is None:
            own = max(step.num_needed(max_tokens) for step in steps)
            progress.num_micro_batches = max(policy.collect_over_ranks(own))
            progress.length = len(steps) * progress.num_micro_batches
            policy.settle_micro_batches(progress.num_micro_batches, len(steps))
        first = 0 if saved is None else saved.num_given
        for number, batch in enumerate(split_into_micro_batches(steps, progress.num_micro_batches)):
            self.ahead.check()  # an error of the sampling thread ends the run here, not after the phase
            if number >= first:
                progress.num_given = number + 1
                yield batch

    @property
    def loaded_pool(self) -> ExpertPool:
        """The demonstrations; ``setup`` must have run."""
        assert self.pool is not None, "setup has not run"
        return self.pool

    # Checkpoints

    def state_dict(self, policy: TrainedPolicy, *, is_running: bool) -> dict[str, Any]:
        """Data positions, the unfinished rollout batch and the one sampled ahead, for all ranks.

        Collective. Waits for rollouts that are being sampled ahead.

        Args:
            policy: the policy in training
            is_running: whether a phase has begun and not ended
        """
        state: dict[str, Any] = {
            "num_passes": self.num_passes,
            "num_rollout_batches": self.num_rollout_batches,
            "num_drawn": self._num_drawn,
        }
        if self.ahead.is_there:  # on every rank or none
            state["ahead"] = policy.collect_over_ranks(self.ahead.packed())
        if is_running and self._progress.is_within:
            own = None if policy.stage == Stage.SFT or self.rollouts is None else pack(self.rollouts)
            state["phase"] = self._progress.state_dict(policy.collect_over_ranks(own))
        return state

    def load_state_dict(self, state: dict[str, Any], process: Process, *, samples_ahead: bool = False) -> None:
        """Restore the positions in the data, and saved rollouts.

        Rollouts that were sampled ahead need the same number of ranks and ``samples_ahead``. Otherwise they are
        dropped, and their problems are sampled again in their phase.

        Raises:
            UserError: a mid-epoch checkpoint was saved on another number of ranks.
        """
        self.num_passes, self.num_rollout_batches = state["num_passes"], state["num_rollout_batches"]
        self._num_drawn = self.collector.num_drawn = state["num_drawn"]
        ahead = state.get("ahead", [])
        if samples_ahead and len(ahead) == process.world_size:
            self.ahead.saved = ahead[process.rank]
        if state.get("phase") is not None:
            self._saved = MidEpochPosition.from_state_dict(state["phase"], *process)

    def drop_ahead(self) -> None:
        """Drop rollouts that were sampled ahead: the run ended before their phase."""
        self.ahead.drop()
        self.collector.num_drawn = self._num_drawn
