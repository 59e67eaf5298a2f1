"""What each phase trains on, from its first micro-batch to its last, and how far training has come.

A phase is a Lightning epoch: a pass over the demonstrations, or a collection of rollouts with its PPO epochs and
minibatches. Which data it holds follows from the seed and its number, so a resumed run goes on with the same; only the
rollouts of a phase that is under way have to be kept, and those of the next one where they are made ahead of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from egspo_lightning.checkpointing.mid_epoch import CutOff
from egspo_lightning.data.expert_pool import ExpertPool
from egspo_lightning.data.sized_loader import SizedLoader
from egspo_lightning.rollout.collector import Collector
from egspo_lightning.rollout.policy_protocol import RolloutPolicy, TrainedPolicy
from egspo_lightning.rollout.rollout_state import pack, unpack
from egspo_lightning.rollout.sampling_ahead import SamplingAhead
from egspo_lightning.rollout.scoring import CollectedRollouts, ScoredGroups, prepare
from egspo_lightning.training.micro_batches import UpdateShare
from egspo_lightning.training.minibatches import RolloutShare, plan_updates, share_updates
from egspo_lightning.types import Stage, TrainingBatch


@dataclass(frozen=True)
class PhaseSizes:
    """How a phase is cut into updates; all over ranks and accumulated micro-batches.

    Args:
        sft_batch_size: Demonstrations an update in stage SFT.
        expert_batch_size: Demonstrations that an update in stage EGSPO carries where mu > 0.
        num_ppo_epochs: Passes over a collection.
        num_minibatches: Updates a pass.
        max_tokens: Tokens of a micro-batch at most, from which the number of micro-batches an update is found for each
            phase; None takes the number that is given.
    """

    sft_batch_size: int
    expert_batch_size: int
    num_ppo_epochs: int
    num_minibatches: int
    max_tokens: int | None = None


class Split(NamedTuple):
    """What of an update falls to this process."""

    rank: int
    world_size: int
    parts: int
    """Micro-batches an update, on each rank, unless it is found from their tokens."""


class Phases:
    """Makes the micro-batches of one phase after another.

    Args:
        collector: Samples and grades rollouts.
        sizes: How phases are cut.
        seed: Of the order within a collection.
    """

    def __init__(self, collector: Collector, sizes: PhaseSizes, seed: int) -> None:
        self.collector, self.sizes, self.seed = collector, sizes, seed
        self.num_passes = self.num_rollout_batches = 0
        """Of SFT data and of rollouts, begun in this run."""
        self.rollouts: CollectedRollouts | None = None
        self.pool: ExpertPool | None = None
        """The demonstrations, once they are loaded."""
        self.ahead = SamplingAhead()
        """The collection of the next phase, where it is sampled while this one is trained on."""
        self._num_drawn = 0  # problems of the collections that were begun; the collector may be ahead of that
        self._parts = self._length = self._num_given = 0  # micro-batches an update, of the latest phase, given of it
        self._cut_off: CutOff | None = None  # the phase that a checkpoint was made in, until it goes on

    def loader(self, policy: TrainedPolicy, split: Split, *, looks_ahead: bool = False) -> SizedLoader:
        """The loader of the coming phase, by the policy's stage; a phase that was cut off goes on where it was.

        Args:
            policy: What is trained
            split: What of an update falls to this process
            looks_ahead: Whether the rollouts of the phase after it are sampled meanwhile, by the policy as it is when
                this one begins

        Raises:
            UserError: it is cut otherwise than the phase that the checkpoint was made in.
        """
        is_sft = policy.stage == Stage.SFT
        updates = self._num_sft_updates if is_sft else self.sizes.num_ppo_epochs * self.sizes.num_minibatches
        cut_off, self._cut_off = self._cut_off, None
        parts, first = split.parts, 0
        if cut_off is not None:
            parts, first = cut_off.parts_now(updates, parts, self.sizes.max_tokens), cut_off.num_given
            if self.sizes.max_tokens is not None:  # Lightning counts from where it was as soon as it has the loader
                policy.settle_micro_batches(parts, updates)
        self._parts, self._length, self._num_given = parts, updates * parts, first
        shares = self._sft_shares if is_sft else self._rollout_shares

        def batches() -> Iterator[TrainingBatch]:
            made = shares(policy, split, cut_off, looks_ahead)
            if self.sizes.max_tokens is not None and cut_off is None:
                self._settle_parts(policy, made, self.sizes.max_tokens)
            for number, batch in enumerate(self._micro_batches(made)):
                if number >= first:
                    self._num_given = number + 1
                    yield batch

        return SizedLoader(self._length, batches)

    def _settle_parts(self, policy: TrainedPolicy, shares: list[UpdateShare], max_tokens: int) -> None:
        """Find the least number of micro-batches that is enough for every update of the phase on every rank."""
        own = max(share.num_needed(max_tokens) for share in shares)
        self._parts = max(policy.collect_over_ranks(own))
        self._length = len(shares) * self._parts
        policy.settle_micro_batches(self._parts, len(shares))

    def _micro_batches(self, shares: list[UpdateShare]) -> Iterator[TrainingBatch]:
        for share in shares:
            for batch in share.micro_batches(self._parts):
                self.ahead.check()
                yield batch

    # Stage SFT

    def _sft_shares(
        self, policy: TrainedPolicy, split: Split, cut_off: CutOff | None, looks_ahead: bool
    ) -> list[UpdateShare]:
        """One pass over the demonstrations."""
        self.num_passes += cut_off is None
        size, count = self.sizes.sft_batch_size, len(self._pool.demonstrations)
        order = self._pool.draw((self.num_passes - 1) * count, count)
        updates = [order[start : start + size] for start in range(0, count, size)]
        return [UpdateShare(None, self._pool.share(update, split.rank, split.world_size)) for update in updates]

    @property
    def _num_sft_updates(self) -> int:
        return -(-len(self._pool.demonstrations) // self.sizes.sft_batch_size)

    # Stage EGSPO

    def _rollout_shares(
        self, policy: TrainedPolicy, split: Split, cut_off: CutOff | None, looks_ahead: bool
    ) -> list[UpdateShare]:
        """One collection of rollouts, and the updates on it."""
        if cut_off is None:
            self.rollouts = self._collect(policy, split)
            self.num_rollout_batches += 1
            if looks_ahead:
                number = self.num_rollout_batches
                self.ahead.start(policy.snapshot(), lambda frozen: self._prepare(frozen, split, number))
        else:
            assert cut_off.packed is not None
            self.rollouts = unpack(cut_off.packed, policy.device)
        number = self.num_rollout_batches - 1
        shares = self._updates(policy, self.rollouts, number)
        if not policy.mixes_expert_data:
            return [UpdateShare(share, None) for share in shares]
        size = self.sizes.expert_batch_size
        drawn = (self._pool.draw((number * len(shares) + i) * size, size) for i in range(len(shares)))
        experts = [self._pool.share(update, split.rank, split.world_size) for update in drawn]
        return [UpdateShare(*pair) for pair in zip(shares, experts, strict=True)]

    def _collect(self, policy: TrainedPolicy, split: Split) -> CollectedRollouts:
        """The collection that was made ahead, or else one that is made now; admitted to training."""
        prepared = self.ahead.take(policy.device)
        if prepared is None:
            prepared = self._prepare(policy, split, self.num_rollout_batches)
        else:
            waited = {"time/wait": (self.ahead.seconds_waited, 1.0)}
            prepared = prepared._replace(measurements={**prepared.measurements, **waited})
        self._num_drawn = self.collector.num_drawn = prepared.num_drawn
        return CollectedRollouts(
            completions=prepared.completions,
            batch=policy.to_rollout_batch(prepared.rollouts, prepared.measurements),
            measurements=prepared.measurements,
            numbers=prepared.numbers,
            expert_groups=prepared.rollouts.expert_groups.tolist(),
        )

    def _prepare(self, policy: RolloutPolicy, split: Split, number: int) -> ScoredGroups:
        return prepare(policy, self.collector, number, split.rank, split.world_size)

    def _updates(self, policy: TrainedPolicy, rollouts: CollectedRollouts, number: int) -> list[RolloutShare]:
        plan = plan_updates(
            rollouts.numbers,
            self.collector.num_generations,
            self.sizes.num_minibatches,
            self.sizes.num_ppo_epochs,
            seed=f"{self.seed}/{number}",
            expert_groups=rollouts.expert_groups,
        )
        keep, total = policy.needs_every_rollout, policy.sum_over_ranks
        return share_updates(rollouts.batch, plan, keep_inactive=keep, total=total)

    @property
    def _pool(self) -> ExpertPool:
        assert self.pool is not None, "setup has not run"
        return self.pool

    # Checkpoints

    def state_dict(self, policy: TrainedPolicy, *, is_running: bool) -> dict[str, Any]:
        """How far the streams of data have been drawn and, on every rank, the rollouts within a phase and those ahead.

        Collective. The latter are waited for.
        """
        state: dict[str, Any] = {
            "num_passes": self.num_passes,
            "num_rollout_batches": self.num_rollout_batches,
            "num_drawn": self._num_drawn,
        }
        if self.ahead.is_there:  # on every rank or none
            state["ahead"] = policy.collect_over_ranks(self.ahead.packed())
        if is_running and 0 < self._num_given < self._length:
            own = None if policy.stage == Stage.SFT or self.rollouts is None else pack(self.rollouts)
            phase = CutOff(self._num_given, self._length, self._parts, self.sizes.max_tokens, own)
            state["phase"] = phase.state_dict(policy.collect_over_ranks(own))
        return state

    def load_state_dict(self, state: dict[str, Any], rank: int, world_size: int, *, looks_ahead: bool = False) -> None:
        """Go on where they were.

        Rollouts that were made ahead are those of a number of ranks; where that or ``looks_ahead`` has changed, their
        problems are sampled anew when their phase comes.

        Raises:
            UserError: within a phase, another number of ranks shared its data.
        """
        self.num_passes, self.num_rollout_batches = state["num_passes"], state["num_rollout_batches"]
        self._num_drawn = self.collector.num_drawn = state["num_drawn"]
        ahead = state.get("ahead", [])
        if looks_ahead and len(ahead) == world_size:
            self.ahead.saved = ahead[rank]
        if state.get("phase") is not None:
            self._cut_off = CutOff.of_checkpoint(state["phase"], rank, world_size)

    def drop_ahead(self) -> None:
        """End what is being made ahead: its phase will not come, or not in this run."""
        self.ahead.drop()
        self.collector.num_drawn = self._num_drawn
