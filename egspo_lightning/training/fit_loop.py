"""Fit-loop overrides: gradient accumulation and length of an epoch, resume at the end of an epoch, start of a run.

Lightning reads ``trainer.accumulate_grad_batches`` anew at every batch, as its GradientAccumulationScheduler needs. But
it asks a loader for its length before ``on_train_epoch_start`` and, at the start of a run, before ``on_train_start``.
Rollouts, whose lengths decide, are sampled later. So the numbers are corrected when the first batch is fetched, after
those hooks. Until then Lightning has used them only to see that the epoch is not empty.
"""

from typing import Any


def begins_run(trainer: Any) -> bool:
    """Whether the fit that is being set up starts a run, instead of continuing that of an earlier fit of the trainer.

    A run starts with a trainer that has taken no optimizer step, or with a checkpoint, whose state is loaded after
    ``setup``. Module, datamodule and callbacks then begin with the state of a run as it was before any run. Weights
    stay.
    """
    return trainer.global_step == 0 or trainer.ckpt_path is not None


def set_epoch_length(trainer: Any, num_micro_batches: int, num_steps: int) -> None:
    """Set the length of the epoch that begins: ``num_steps`` optimizer steps of ``num_micro_batches`` batches."""
    loop, length = trainer.fit_loop, num_steps * num_micro_batches
    assert hasattr(loop, "max_batches")
    trainer.accumulate_grad_batches = num_micro_batches
    loop.max_batches = length
    if isinstance(trainer.val_check_interval, float):
        trainer.val_check_batch = max(int(length * trainer.val_check_interval), 1)
    if loop._data_fetcher is not None:  # a run's first loader is requested before there is one
        loop._data_fetcher.length = length  # is_last_batch is derived from it


def resume_with_next_epoch(trainer: Any) -> None:
    """Make a run that resumes at the end of an epoch begin with the next epoch, also under ``trainer.max_steps``.

    With max_steps, Lightning resumes by iteration: at the end of an epoch, it would skip the next one.
    """
    assert hasattr(trainer.fit_loop, "_iteration_based_training")
    trainer.fit_loop._iteration_based_training = lambda: False


def reload_every_epoch(trainer: Any) -> None:
    """Request a loader for each epoch, where ``trainer.reload_dataloaders_every_n_epochs`` has its default of 0."""
    trainer.reload_dataloaders_every_n_epochs = trainer.reload_dataloaders_every_n_epochs or 1


def extend_fast_dev_run(trainer: Any) -> None:
    """Let ``trainer.fast_dev_run`` n, which Lightning ends after n steps of one epoch, take n steps of both stages."""
    trainer.fit_loop.max_epochs = 2
    trainer.fit_loop.epoch_loop.max_steps = 2 * int(trainer.fast_dev_run)
