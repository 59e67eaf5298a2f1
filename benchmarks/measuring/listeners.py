"""Callbacks that time the iterations of a run: an iteration is a collection with all updates on it."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from measuring.timing import Reading, Stopwatch


class IterationTimes(Callback):
    """Time from the end of one iteration to the end of the next, Lightning's own share included.

    Args:
        warmup: Iterations that do not count.
    """

    def __init__(self, warmup: int = 2) -> None:
        super().__init__()
        self.warmup = warmup
        self.readings: list[Reading] = []
        self.tokens: list[int] = []
        self._watch: Stopwatch | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An iteration ends, and the next one begins."""
        if self._watch is not None:
            self._watch.stop()
            self.readings.append(self._watch.total)
            self.tokens.append(_num_tokens(trainer))
        if trainer.current_epoch + 1 >= self.warmup:
            self._watch = Stopwatch()
            self._watch.start()


def _num_tokens(trainer: Trainer) -> int:
    collection = trainer.datamodule.rollouts  # type: ignore[attr-defined]
    return sum(len(completion.token_ids) for completion in collection.completions)


class PhaseTimes(Callback):
    """What a run logs as ``time/...`` of each phase, seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A phase ends."""
        logged = trainer.callback_metrics.items()
        self.times.append({name: float(value) for name, value in logged if name.startswith("time/")})


class Replay(Callback):
    """Goes through the same iteration again and again, from the same weights and moments, in one way after another.

    The same completions are sampled each time, so nothing differs but the ways. Restoring is not timed.

    Args:
        ways: Names in ``switches``, which are taken in turn.
        rounds: Iterations of each that count, behind one of each that does not.
    """

    switches: ClassVar[dict[str, Callable[[Any], None]]] = {}
    """Name to what makes the module go that way; a benchmark sets them before its run."""

    def __init__(self, ways: list[str], rounds: int) -> None:
        super().__init__()
        turns = [ways if number % 2 == 0 else ways[::-1] for number in range(rounds + 1)]
        self.order = [way for turn in turns for way in turn]
        self.num_warmup = len(ways)
        self.readings: dict[str, list[Reading]] = {way: [] for way in ways}
        self.collections: dict[str, Any] = {}
        self._watch = Stopwatch()
        self._state: Any = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the start, and another way."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        optimizer = trainer.optimizers[0]
        if self._state is None:
            state = pl_module.state_dict(), optimizer.state_dict(), data.state_dict()
            self._state = copy.deepcopy(state)
        weights, moments, streams = copy.deepcopy(self._state)
        pl_module.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        data.load_state_dict(streams)
        self.switches[self.order[trainer.current_epoch]](pl_module)
        self._watch = Stopwatch()
        self._watch.start()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The iteration ends."""
        self._watch.stop()
        way = self.order[trainer.current_epoch]
        self.collections[way] = trainer.datamodule.rollouts  # type: ignore[attr-defined]
        if trainer.current_epoch >= self.num_warmup:
            self.readings[way].append(self._watch.total)


class UpdateTimes(Callback):
    """Times the updates of each iteration, and right after them a bare forward and backward pass of their tokens.

    The time of the updates goes from the start of the first to the end of the last: forward, backward, clipping,
    optimizer, logging and the cutting of minibatches; sampling and scoring come before.
    """

    bare: Callable[[Any, list[Any]], None]
    """Runs the bare passes on a module and the batches of an iteration; a benchmark sets it before its run."""

    def __init__(self, warmup: int = 1) -> None:
        super().__init__()
        self.warmup = warmup
        self.updates: list[Reading] = []
        self.bares: list[Reading] = []
        self._batches: list[Any] = []
        self._watch = Stopwatch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The first update begins."""
        if batch_idx == 0:
            self._batches, self._watch = [], Stopwatch()
            self._watch.start()
        self._batches.append(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last update has ended, and been logged."""
        self._watch.stop()
        watch = Stopwatch()
        watch.start()
        with torch.enable_grad():
            type(self).bare(pl_module, self._batches)
        watch.stop()
        for parameter in pl_module.parameters():
            parameter.grad = None
        if trainer.current_epoch >= self.warmup:
            self.updates.append(self._watch.total)
            self.bares.append(watch.total)


class UntilAccurate(Callback):
    """Ends the run when it is accurate enough; time counts without the measuring.

    Args:
        target: Held-out accuracy.
        every: Iterations from one measurement to the next.
    """

    accuracy: Callable[[Any], float]
    """Of a language model; a benchmark sets it before its run."""

    def __init__(self, target: float, every: int) -> None:
        super().__init__()
        self.target, self.every = target, every
        self.curve: list[tuple[int, float, float]] = []
        """Iterations, seconds, accuracy"""
        self._watch = Stopwatch()
        self._count = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first iteration begins."""
        if self._count == 0:
            self._watch.start()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An iteration ends."""
        policy: Any = pl_module.policy
        trainer.should_stop = self.ended(policy.lm)

    def ended(self, lm: Any) -> bool:
        """Whether it is accurate enough; for loops that are not Lightning's, which begin with ``begin``."""
        self._count += 1
        if self._count % self.every:
            return False
        self._watch.stop()
        self.curve.append((self._count, self._watch.total.wall, type(self).accuracy(lm)))
        self._watch.start()
        return self.curve[-1][2] >= self.target

    def begin(self) -> None:
        """Start the clock."""
        self._watch.start()
