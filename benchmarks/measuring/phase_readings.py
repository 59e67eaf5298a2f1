"""Callback that keeps seconds, tokens and metrics of each phase; it waits for the device before it reads the clock."""

import math
import statistics
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from egspo_lightning.ops.batching import row_lengths
from measuring.timing import Stopwatch


class Phase(NamedTuple):
    """Optimizer steps of one phase, without sampling and scoring, and its metrics."""

    seconds: float
    tokens: int
    """trained tokens, prompts and completions, without padding"""
    completion_tokens: int
    squares: int
    """sum of the squared lengths of the sequences"""
    metrics: dict[str, float]


class PhaseReadings(Callback):
    """Reads every phase.

    Args:
        warmup: Number of phases that ``median`` leaves out.
    """

    def __init__(self, warmup: int = 1) -> None:
        super().__init__()
        self.warmup = warmup
        self.phases: list[Phase] = []
        self._watch = Stopwatch()
        self._masks: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock at the first batch; masks are counted later, because counting waits for the device."""
        if batch_idx == 0:
            synchronize()
            self._masks, self._watch = [], Stopwatch()
            self._watch.start()
        self._masks += [part.completion_mask for part in (batch.rollout, batch.expert) if part is not None]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock and keep the phase."""
        synchronize()
        self._watch.stop()
        lengths = [length for mask in self._masks if mask.numel() for length in row_lengths(mask).tolist()]
        num_completion_tokens = sum(int(mask.sum()) for mask in self._masks)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        squares = sum(length**2 for length in lengths)
        self.phases.append(Phase(self._watch.total.wall, sum(lengths), num_completion_tokens, squares, metrics))

    def median(self, metric: str) -> float:
        """Median of a metric over the phases after the warm-up; NaN where it was never logged."""
        values = [phase.metrics[metric] for phase in self.phases[self.warmup :] if metric in phase.metrics]
        return statistics.median(values) if values else math.nan


def synchronize() -> None:
    """Wait until a GPU has finished its work."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def step_flops(lm: Any, phase: Phase) -> float:
    """Floating-point operations of the phase's forward and backward passes, each matrix product counted once.

    ``6 N`` for each token, where N are the parameters without the embedding; ``6 V D`` for each completion token, whose
    logits are computed; ``6 L D T`` for each token of a sequence of T tokens, causal attention in L layers. The sum of
    the last term over a sequence is ``6 L D T^2``. After PaLM (arXiv 2204.02311, appendix B), which counts all of
    attention, ``12 L D T``. Recomputed logits do not count. An untied output layer counts like the embedding.
    """
    ends = {lm.get_input_embeddings().weight, lm.get_output_embeddings().weight}
    inner = sum(p.numel() for p in lm.parameters()) - sum(weight.numel() for weight in ends)
    head = lm.get_output_embeddings().weight.numel()
    attention = lm.config.num_hidden_layers * lm.config.hidden_size * phase.squares
    return 6.0 * (inner * phase.tokens + head * phase.completion_tokens + attention)
