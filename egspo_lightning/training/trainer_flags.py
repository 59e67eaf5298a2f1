"""Checks of the flags of a run, told as the user's mistakes."""

from typing import Any

from egspo_lightning.errors import UserError, require


def require_budget(max_tokens: int, longest: int, parts: int) -> None:
    """Refuse a budget of tokens that a single row may exceed, or beside it a number of micro-batches.

    Args:
        max_tokens: data.max_tokens_per_micro_batch
        longest: tokens of a micro-batch of one row at most
        parts: trainer.accumulate_grad_batches

    Raises:
        UserError: it cannot be kept, or both are given.
    """
    if parts > 1:
        raise UserError(
            f"trainer.accumulate_grad_batches = {parts} gives the number of micro-batches an update, and "
            f"data.max_tokens_per_micro_batch = {max_tokens} has it found from their tokens. Leave out "
            "accumulate_grad_batches to bound tokens, or max_tokens_per_micro_batch to give the number."
        )
    allowed = (
        f"at least {longest}, the tokens of the longest row that may come with data.max_prompt_length and "
        "data.max_completion_length, which no micro-batch can cut; raise it, or lower one of these"
    )
    require(max_tokens >= longest, "data.max_tokens_per_micro_batch", max_tokens, allowed)


def require_phases(trainer: Any, *, finds_parts: bool = False) -> None:
    """Refuse Lightning's flags under which an epoch would not be a phase.

    Args:
        trainer: Lightning's
        finds_parts: whether the number of micro-batches an update is found from their tokens

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
    if finds_parts and not isinstance(limit, float):
        raise UserError(
            f"trainer.limit_train_batches = {limit} counts micro-batches, and data.max_tokens_per_micro_batch has "
            "their number found for each phase. Leave out one of them, or limit updates by trainer.max_steps."
        )
    whole = limit == 1.0 if isinstance(limit, float) else limit > 0 and limit % trainer.accumulate_grad_batches == 0
    if not whole or trainer.overfit_batches:
        raise UserError(
            f"trainer.limit_train_batches = {limit} (overfit_batches = {trainer.overfit_batches}) would cut an "
            f"update into pieces. Give a multiple of accumulate_grad_batches = {trainer.accumulate_grad_batches}, "
            "or change data.num_problems and data.num_ppo_epochs instead."
        )
