"""Training data pipeline: problems, rollouts, advantages, gate, optimizer steps, micro-batches.

A phase is one Lightning epoch: an SFT pass over the demonstrations, or one rollout batch with its PPO epochs and
minibatches. ``Phases.rollout_phase`` is the whole rollout phase in order. All ranks must call the methods
marked as collective.

The order of the data depends only on the seed and on the numbers of phases and problems drawn, which checkpoints hold.
So a resumed run draws the same data. Of the rollouts, only a batch that is being trained on or was sampled ahead is
saved.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from egspo_lightning.checkpointing.mid_epoch import MidEpochPosition
from egspo_lightning.data.expert_pool import ExpertPool, ExpertShare
from egspo_lightning.data.sized_loader import SizedLoader
from egspo_lightning.rollout.collector import Collector
from egspo_lightning.rollout.policy_protocol import RolloutPolicy, TrainedPolicy
from egspo_lightning.rollout.rollout_records import CollectedRollouts, ScoredGroups, pack, unpack
from egspo_lightning.rollout.sampling_ahead import SamplingAhead
from egspo_lightning.rollout.scoring import completions_by_row, score
from egspo_lightning.training.micro_batches import RolloutShare, StepShare, plan_optimizer_steps, share_optimizer_steps
from egspo_lightning.types import Stage, TrainingBatch


@dataclass
class Phases:
    """Makes the micro-batches of one phase after another. Sizes other than ``max_tokens`` are over all ranks.

    Args:
        collector: Draws problems, and samples and grades completions.
        sft_batch_size: Demonstrations of an optimizer step in stage SFT.
        expert_batch_size: Demonstrations of an optimizer step in stage EGSPO, where mu > 0.
        num_ppo_epochs: Passes over a rollout batch.
        num_minibatches: Optimizer steps of a pass.
        max_tokens: Token budget of a micro-batch. Their number then varies by phase. None takes their number from
            trainer.accumulate_grad_batches.
        seed: Seed of the order within a rollout batch.
    """

    collector: Collector
    sft_batch_size: int
    expert_batch_size: int
    num_ppo_epochs: int
    num_minibatches: int
    max_tokens: int | None
    seed: int

    num_passes: int = field(default=0, init=False)
    """Number of SFT passes started."""
    num_rollout_batches: int = field(default=0, init=False)
    """Number of rollout batches started."""
    rollouts: CollectedRollouts | None = field(default=None, init=False)
    """The latest rollout batch of this rank."""
    pool: ExpertPool = field(init=False, repr=False)
    """The demonstrations, once they are loaded."""
    rank: int = field(default=0, init=False)
    """This process among the ranks of the run, once it is set up."""
    world_size: int = field(default=1, init=False)
    """Number of ranks, once the run is set up."""
    ahead: SamplingAhead = field(default_factory=SamplingAhead, init=False)
    """The next rollout batch, where it is sampled while this one is trained on."""
    _num_drawn: int = field(default=0, init=False)  # collector.num_drawn also counts problems that are sampled ahead
    _progress: MidEpochPosition = field(default_factory=MidEpochPosition, init=False)
    _saved: MidEpochPosition | None = field(default=None, init=False)
    """Position of a mid-epoch checkpoint, until its phase continues."""

    # The rollout phase, in stage EGSPO

    def rollout_phase(
        self, policy: TrainedPolicy, saved: MidEpochPosition | None, samples_ahead: bool
    ) -> Iterator[TrainingBatch]:
        """Make a rollout batch, then give the micro-batches of each optimizer step on it. Collective.

        Args:
            policy: the policy in training
            saved: position of a mid-epoch checkpoint whose phase continues
            samples_ahead: whether to sample the next rollout batch in a thread, from a snapshot of the current policy
        """
        if saved is None:
            scored = self.ahead.take(policy.device)
            if scored is None:
                scored = self.sample_and_score(policy, self.num_rollout_batches)
            self.rollouts = self.with_advantages_and_gate(policy, scored)
            self.num_rollout_batches += 1
            if samples_ahead:
                number = self.num_rollout_batches
                self.ahead.start(policy.snapshot(), lambda snapshot: self.sample_and_score(snapshot, number))
        else:
            assert saved.rollouts is not None
            self.rollouts = unpack(CollectedRollouts, saved.rollouts, policy.device)
        rollout_shares = self.split_into_optimizer_steps(policy, self.rollouts)
        expert_shares = self.draw_demonstrations(policy, len(rollout_shares))
        steps = [StepShare(*pair) for pair in zip(rollout_shares, expert_shares, strict=True)]
        yield from self.micro_batches(policy, steps, saved)

    def sample_and_score(self, policy: RolloutPolicy, number: int) -> ScoredGroups:
        """Sample, grade (``rollout.grade_rollouts``) and score rollout batch ``number``. Collective."""
        collector = self.collector
        drawn = collector.draw_problems(number, self.rank, self.world_size)
        graded = collector.sample_and_grade(policy, drawn.prompts)
        graded = collector.replace_flat_groups(policy, drawn, graded)
        graded = collector.grade_expert_solutions(policy, drawn, graded)
        rollouts, measurements = score(policy, graded, collector.max_completion_length)
        rollouts = rollouts._replace(number=number)
        numbers = [group.number for group in graded.groups]
        return ScoredGroups(completions_by_row(graded.groups), rollouts, measurements, numbers, collector.num_drawn)

    def with_advantages_and_gate(self, policy: TrainedPolicy, scored: ScoredGroups) -> CollectedRollouts:
        """Turn scored rollouts into a rollout batch that can be trained on. Collective."""
        self._num_drawn = self.collector.num_drawn = scored.num_drawn
        return CollectedRollouts(
            completions=scored.completions,
            batch=policy.add_advantages_and_gate(scored.rollouts, scored.measurements),
            numbers=scored.numbers,
            expert_groups=scored.rollouts.expert_groups.tolist(),
        )

    def split_into_optimizer_steps(self, policy: TrainedPolicy, rollouts: CollectedRollouts) -> list[RolloutShare]:
        """This rank's rows of each optimizer step on the latest rollout batch. Collective."""
        plan = plan_optimizer_steps(
            rollouts.numbers,
            self.collector.num_generations,
            self.num_minibatches,
            self.num_ppo_epochs,
            seed=f"{self.seed}/{self.num_rollout_batches - 1}",
            expert_groups=rollouts.expert_groups,
        )
        keep, total = policy.needs_every_rollout, policy.sum_over_ranks
        return share_optimizer_steps(rollouts.batch, plan, keep_inactive=keep, total=total)

    def draw_demonstrations(self, policy: TrainedPolicy, num_steps: int) -> Sequence[ExpertShare | None]:
        """This rank's demonstrations of each optimizer step on the latest rollout batch; None where mu is always 0."""
        if not policy.mixes_expert_data:
            return [None] * num_steps
        size, first = self.expert_batch_size, (self.num_rollout_batches - 1) * num_steps
        drawn = (self.pool.draw((first + i) * size, size) for i in range(num_steps))
        return [self.pool.share(demonstrations, self.rank, self.world_size) for demonstrations in drawn]

    # The SFT phase

    def sft_phase(self, policy: TrainedPolicy, saved: MidEpochPosition | None) -> Iterator[TrainingBatch]:
        """Give the micro-batches of one pass over the demonstrations; arguments as in ``rollout_phase``."""
        self.num_passes += saved is None
        size, count = self.sft_batch_size, len(self.pool.demonstrations)
        order = self.pool.draw((self.num_passes - 1) * count, count)
        batches = [order[start : start + size] for start in range(0, count, size)]
        steps = [
            StepShare(None, self.pool.share(demonstrations, self.rank, self.world_size)) for demonstrations in batches
        ]
        yield from self.micro_batches(policy, steps, saved)

    # Either phase

    def loader(self, policy: TrainedPolicy, num_micro_batches: int, *, samples_ahead: bool) -> SizedLoader:
        """The loader of the next phase, by the policy's stage; it continues the phase of a mid-epoch checkpoint.

        Args:
            policy: the policy in training
            num_micro_batches: micro-batches of each optimizer step, unless a token budget sets it
            samples_ahead: whether to sample the next rollout batch in a thread, from a snapshot of the policy at the
                start of this phase

        Raises:
            UserError: this config has a different number of optimizer steps or micro-batches than the checkpoint.
        """
        is_sft = policy.stage == Stage.SFT
        num_sft_steps = -(-len(self.pool.demonstrations) // self.sft_batch_size)
        num_steps = num_sft_steps if is_sft else self.num_ppo_epochs * self.num_minibatches
        saved, self._saved = self._saved, None
        self._progress = MidEpochPosition(num_micro_batches, num_steps * num_micro_batches, self.max_tokens)
        if saved is not None:
            self._progress = saved.resume(num_steps, num_micro_batches, self.max_tokens)
            if self.max_tokens is not None:  # Lightning needs the epoch length as soon as it has the loader
                policy.set_num_micro_batches(self._progress.num_micro_batches, num_steps)
        if is_sft:
            return SizedLoader(self._progress.length, lambda: self.sft_phase(policy, saved))
        return SizedLoader(self._progress.length, lambda: self.rollout_phase(policy, saved, samples_ahead))

    def micro_batches(
        self, policy: TrainedPolicy, steps: Sequence[StepShare], saved: MidEpochPosition | None
    ) -> Iterator[TrainingBatch]:
        """Split optimizer steps into micro-batches, leaving out those before a saved position. Collective."""
        progress = self._progress
        if self.max_tokens is not None and saved is None:
            own = max(step.num_needed(self.max_tokens) for step in steps)
            progress.num_micro_batches = max(policy.collect_over_ranks(own))
            progress.length = len(steps) * progress.num_micro_batches
            policy.set_num_micro_batches(progress.num_micro_batches, len(steps))
        batches = (batch for step in steps for batch in step.micro_batches(progress.num_micro_batches))
        first = 0 if saved is None else saved.num_given
        for number, batch in enumerate(batches):
            self.ahead.check()  # an error of the sampling thread ends the run here, not after the phase
            if number >= first:
                progress.num_given = number + 1
                yield batch

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
        if is_running and 0 < self._progress.num_given < self._progress.length:
            own = None if policy.stage == Stage.SFT or self.rollouts is None else pack(self.rollouts)
            state["phase"] = self._progress.state_dict(policy.collect_over_ranks(own))
        return state

    def load_state_dict(self, state: dict[str, Any], *, samples_ahead: bool) -> None:
        """Restore the positions in the data, and saved rollouts.

        Rollouts that were sampled ahead need the same number of ranks and ``samples_ahead``. Otherwise they are
        dropped, and their problems are sampled again in their phase.

        Raises:
            UserError: a mid-epoch checkpoint was saved on another number of ranks.
        """
        self.num_passes, self.num_rollout_batches = state["num_passes"], state["num_rollout_batches"]
        self._num_drawn = self.collector.num_drawn = state["num_drawn"]
        ahead = state.get("ahead", [])
        if samples_ahead and len(ahead) == self.world_size:
            self.ahead.saved = ahead[self.rank]
        elif ahead:
            rank_zero_info(
                "The checkpoint holds rollouts that were sampled ahead on another number of ranks or with another "
                "data.max_staleness. They are dropped, and their problems are sampled again."
            )
        if state.get("phase") is not None:
            self._saved = MidEpochPosition.from_state_dict(state["phase"], self.rank, self.world_size)

    def drop_ahead(self) -> None:
        """Drop rollouts that were sampled ahead: the run ended before their phase."""
        self.ahead.drop()
        self.collector.num_drawn = self._num_drawn
