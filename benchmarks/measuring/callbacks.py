"""Callbacks that time iterations. An iteration is a rollout batch with all its optimizer steps."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from measuring.timing import Reading, Stopwatch


class IterationTimes(Callback):
    """Times each iteration from the end of the one before, so Lightning's overhead is included.

    Args:
        warmup: Number of iterations that are not recorded.
    """

    def __init__(self, warmup: int = 2) -> None:
        super().__init__()
        self.warmup = warmup
        self.readings: list[Reading] = []
        self.tokens: list[int] = []
        self._watch: Stopwatch | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the iteration and start the clock of the next one."""
        if self._watch is not None:
            self._watch.stop()
            self.readings.append(self._watch.total)
            self.tokens.append(_num_tokens(trainer))
        if trainer.current_epoch + 1 >= self.warmup:
            self._watch = Stopwatch()
            self._watch.start()


def _num_tokens(trainer: Trainer) -> int:
    rollouts = trainer.datamodule.phases.rollouts  # type: ignore[attr-defined]
    return sum(len(completion.token_ids) for completion in rollouts.completions)


class PhaseTimes(Callback):
    """Keeps the ``time/...`` metrics of each phase, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the metrics."""
        logged = trainer.callback_metrics.items()
        self.times.append({name: float(value) for name, value in logged if name.startswith("time/")})


class Replay(Callback):
    """Repeats one iteration from the same weights and optimizer state, with the variants in interleaved order.

    Every repetition samples the same completions, so only the variant differs. Restoring the state is not timed.

    Args:
        variants: Names in ``switches``.
        rounds: Recorded iterations per variant, after one warm-up iteration of each.
    """

    switches: ClassVar[dict[str, Callable[[Any], None]]] = {}
    """Functions that switch the module to a variant, by name. A benchmark sets them before its run."""

    def __init__(self, variants: list[str], rounds: int) -> None:
        super().__init__()
        turns = [variants if number % 2 == 0 else variants[::-1] for number in range(rounds + 1)]
        self.order = [variant for turn in turns for variant in turn]
        self.num_warmup = len(variants)
        self.readings: dict[str, list[Reading]] = {variant: [] for variant in variants}
        self.rollouts: dict[str, Any] = {}
        self._watch = Stopwatch()
        self._state: Any = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the state and switch to the next variant."""
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
        """Record the iteration."""
        self._watch.stop()
        variant = self.order[trainer.current_epoch]
        self.rollouts[variant] = trainer.datamodule.phases.rollouts  # type: ignore[attr-defined]
        if trainer.current_epoch >= self.num_warmup:
            self.readings[variant].append(self._watch.total)


class StepTimes(Callback):
    """Times the optimizer steps of each iteration, and then bare forward and backward passes of the same tokens.

    The optimizer steps include forward, backward, clipping, optimizer, logging and the split into minibatches. Sampling
    and scoring happen before the clock starts.
    """

    bare: Callable[[Any, list[Any]], None]
    """Runs the bare passes, given a module and the batches of an iteration. A benchmark sets it before its run."""

    def __init__(self, warmup: int = 1) -> None:
        super().__init__()
        self.warmup = warmup
        self.steps: list[Reading] = []
        self.bare_passes: list[Reading] = []
        self._batches: list[Any] = []
        self._watch = Stopwatch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock at the first batch."""
        if batch_idx == 0:
            self._batches, self._watch = [], Stopwatch()
            self._watch.start()
        self._batches.append(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and time the bare passes."""
        self._watch.stop()
        watch = Stopwatch()
        watch.start()
        with torch.enable_grad():
            type(self).bare(pl_module, self._batches)
        watch.stop()
        for parameter in pl_module.parameters():
            parameter.grad = None
        if trainer.current_epoch >= self.warmup:
            self.steps.append(self._watch.total)
            self.bare_passes.append(watch.total)


class UntilAccurate(Callback):
    """Ends the run at a target accuracy. The clock does not run during evaluation.

    Args:
        target: Held-out accuracy.
        every: Iterations between two evaluations.
    """

    accuracy: Callable[[Any], float]
    """Evaluates a language model. A benchmark sets it before its run."""

    def __init__(self, target: float, every: int) -> None:
        super().__init__()
        self.target, self.every = target, every
        self.curve: list[tuple[int, float, float]] = []
        """Iterations, seconds, accuracy"""
        self._watch = Stopwatch()
        self._count = 0

    def begin(self) -> None:
        """Start the clock."""
        self._watch.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock at the first iteration."""
        if self._count == 0:
            self.begin()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the trainer at the target accuracy."""
        policy: Any = pl_module.policy
        trainer.should_stop = self.is_reached(policy.lm)

    def is_reached(self, lm: Any) -> bool:
        """Count an iteration and evaluate if it is time; loops outside Lightning call this after ``begin``."""
        self._count += 1
        if self._count % self.every:
            return False
        self._watch.stop()
        self.curve.append((self._count, self._watch.total.wall, type(self).accuracy(lm)))
        self._watch.start()
        return self.curve[-1][2] >= self.target
