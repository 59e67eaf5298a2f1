"""What Lightning's loops are told while a run is on: how many batches make an update, and that epochs are counted.

Lightning reads ``trainer.accumulate_grad_batches`` anew at every batch; its GradientAccumulationScheduler changes it
between epochs. But it asks a loader for its length before ``on_train_epoch_start`` and, at the start of a run, before
``on_train_start``: too early to sample the rollouts whose lengths decide. So the numbers are put right where the first
batch is fetched, after those hooks: nothing has been counted against them by then but that the epoch is not empty.
"""

from typing import Any

_GIVEN = "_egspo_given_parts"
"""Where a fit loop keeps the user's own number."""


def settle(trainer: Any, num_micro_batches: int, num_updates: int) -> None:
    """Let the epoch that begins have ``num_updates`` updates of ``num_micro_batches`` batches each."""
    loop, length = trainer.fit_loop, num_updates * num_micro_batches
    assert hasattr(loop, "max_batches")
    assert hasattr(loop, "_data_fetcher")
    if not hasattr(loop, _GIVEN):
        setattr(loop, _GIVEN, trainer.accumulate_grad_batches)
    trainer.accumulate_grad_batches = num_micro_batches
    loop.max_batches = length
    if isinstance(trainer.val_check_interval, float):
        trainer.val_check_batch = max(int(length * trainer.val_check_interval), 1)
    if loop._data_fetcher is not None:  # there is none yet where the loader of a run's first epoch is asked for
        loop._data_fetcher.length = length  # from which is_last_batch follows


def forget(trainer: Any) -> None:
    """Leave the trainer's flag as the user gave it, where ``settle`` has changed it."""
    if hasattr(trainer.fit_loop, _GIVEN):
        trainer.accumulate_grad_batches = getattr(trainer.fit_loop, _GIVEN)
        delattr(trainer.fit_loop, _GIVEN)


def count_epochs(trainer: Any) -> None:
    """Have a run that is resumed begin with the epoch that comes, also where ``trainer.max_steps`` bounds it.

    Lightning takes such a run for one that counts no epochs: resumed where an epoch has just ended, it skips the next.
    """
    assert hasattr(trainer.fit_loop, "_iteration_based_training")
    trainer.fit_loop._iteration_based_training = lambda: False
