"""Checks of the flags of a run, told as the user's mistakes."""

from typing import Any

from egspo_lightning.errors import UserError, require


def require_phases(trainer: Any) -> None:
    """Refuse Lightning's flags under which an epoch would not be a phase.

    Raises:
        UserError: it would not.
    """
    parts = trainer.accumulate_grad_batches
    require(parts >= 1, "trainer.accumulate_grad_batches", parts, "at least 1")
    allowed = "at least 1, or -1 to go on until trainer.max_steps or trainer.max_time"
    require(trainer.max_epochs != 0, "trainer.max_epochs", trainer.max_epochs, allowed)
    require(trainer.max_steps != 0, "trainer.max_steps", trainer.max_steps, "at least 1, or -1 for no limit")
    if trainer.reload_dataloaders_every_n_epochs != 1:
        raise UserError(
            "trainer.reload_dataloaders_every_n_epochs must be 1, since each epoch has a loader of its own, got "
            f"{trainer.reload_dataloaders_every_n_epochs}."
        )
    limit = trainer.limit_train_batches
    whole = limit == 1.0 if isinstance(limit, float) else limit > 0 and limit % trainer.accumulate_grad_batches == 0
    if not whole or trainer.overfit_batches:
        raise UserError(
            f"trainer.limit_train_batches = {limit} (overfit_batches = {trainer.overfit_batches}) would cut an "
            f"update into pieces. Give a multiple of accumulate_grad_batches = {trainer.accumulate_grad_batches}, "
            "or change data.num_problems and data.num_ppo_epochs instead."
        )
