"""Rules for Lightning's callbacks: refuses those whose meaning this module cannot keep, before training."""

from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)

from egspo_lightning.errors import UserError
from egspo_lightning.types import Stage

METRICS_OF_SFT = ("loss/sft", "loss/total", "policy/skipped_fraction")
FAMILIES_OF_EGSPO = ("loss", "gate", "policy", "rollout", "value", "time", "guard")
"""Families whose metrics only stage EGSPO logs, but for those of ``METRICS_OF_SFT``."""


@runtime_checkable
class EndsSFT(Protocol):
    """The part of StageTransition that tells whether it ends stage SFT."""

    enabled: bool
    sft_end_reason: str | None


def reaches_egspo(trainer: Any, stage: Stage) -> bool:
    """Return whether a run that starts in this stage is set up to train stage EGSPO, however long it takes."""
    return stage == Stage.EGSPO or any(isinstance(it, EndsSFT) and it.enabled for it in trainer.callbacks)


def require_callbacks(trainer: Any) -> None:
    """Refuse callbacks that would change the run without a word, or do nothing.

    Raises:
        UserError: naming the callback, and what to use instead.
    """
    for callback in trainer.callbacks:
        _require_callback(callback)


def _require_callback(callback: Any) -> None:
    if isinstance(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches():
        raise UserError(
            f"trainer.callbacks: GradientAccumulationScheduler with scheduling {callback.scheduling} would merge "
            "optimizer steps, whose sizes the data settings fix. Remove it, and set trainer.accumulate_grad_batches, "
            "which splits each optimizer step into that many micro-batches."
        )
    if isinstance(callback, StochasticWeightAveraging):
        raise UserError(
            "trainer.callbacks: StochasticWeightAveraging copies the module before its networks are built, so it "
            "would average nothing, and it replaces the learning-rate schedule. Use EMAWeightAveraging or "
            "WeightAveraging instead."
        )
    if isinstance(callback, BatchSizeFinder):
        raise UserError(
            "trainer.callbacks: BatchSizeFinder (Tuner.scale_batch_size) changes an attribute that the training data "
            "does not read. Set data.max_tokens_per_micro_batch to bound memory; `egspo plan` estimates it."
        )
    if isinstance(callback, LearningRateFinder):
        raise UserError(
            "trainer.callbacks: LearningRateFinder (Tuner.lr_find) changes an attribute that the optimizer does not "
            "read. Set the learning rates by model.optimizer and stage_transition.learning_rate."
        )


def require_early_stopping(trainer: Any) -> None:
    """Refuse an EarlyStopping that would fail at the end of the first SFT phase, for want of its metric.

    Raises:
        UserError: its metric is logged in stage EGSPO alone.
    """
    for callback in trainer.callbacks:
        monitor = callback.monitor if isinstance(callback, EarlyStopping) and callback.strict else None
        is_late = monitor is not None and monitor.split("/")[0] in FAMILIES_OF_EGSPO and monitor not in METRICS_OF_SFT
        if is_late:
            raise UserError(
                f"trainer.callbacks: EarlyStopping monitors {monitor}, which is not logged in stage SFT. Set its "
                "strict to false, so that it waits for stage EGSPO."
            )
