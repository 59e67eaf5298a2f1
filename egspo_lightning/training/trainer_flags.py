"""Checks of Lightning's flags, reported as mistakes in the config."""

from typing import Any

from egspo_lightning.errors import UserError, require


def require_budget(max_tokens: int, longest: int, parts: int) -> None:
    """Refuse a token budget that a single row may exceed, or a budget together with a number of micro-batches.

    Args:
        max_tokens: data.max_tokens_per_micro_batch
        longest: most tokens of a micro-batch of one row
        parts: trainer.accumulate_grad_batches

    Raises:
        UserError: a row may exceed the budget, or both are given.
    """
    if parts > 1:
        raise UserError(
            f"trainer.accumulate_grad_batches = {parts} sets the number of micro-batches of an optimizer step, and "
            f"data.max_tokens_per_micro_batch = {max_tokens} derives it from their tokens. Leave out "
            "accumulate_grad_batches to bound tokens, or max_tokens_per_micro_batch to set the number."
        )
    allowed = (
        f"at least {longest}, the tokens of the longest row that data.max_prompt_length and "
        "data.max_completion_length allow (raise it, or lower one of these)"
    )
    require(max_tokens >= longest, "data.max_tokens_per_micro_batch", max_tokens, allowed)


def require_phases(trainer: Any, *, finds_parts: bool = False) -> None:
    """Refuse Lightning's flags that keep an epoch from being one whole phase.

    Args:
        trainer: Lightning's
        finds_parts: whether the number of micro-batches of an optimizer step is derived from their tokens

    Raises:
        UserError: naming the flag.
    """
    parts = trainer.accumulate_grad_batches
    require(parts >= 1, "trainer.accumulate_grad_batches", parts, "at least 1")
    allowed = "at least 1, or -1 to go on until trainer.max_steps or trainer.max_time"
    require(trainer.max_epochs != 0, "trainer.max_epochs", trainer.max_epochs, allowed)
    require(trainer.max_steps != 0, "trainer.max_steps", trainer.max_steps, "at least 1, or -1 for no limit")
    if trainer.reload_dataloaders_every_n_epochs != 1:
        raise UserError(
            "trainer.reload_dataloaders_every_n_epochs must be 1, since each epoch has its own loader, got "
            f"{trainer.reload_dataloaders_every_n_epochs}."
        )
    limit = trainer.limit_train_batches
    if finds_parts and not isinstance(limit, float):
        raise UserError(
            f"trainer.limit_train_batches = {limit} counts micro-batches, and data.max_tokens_per_micro_batch "
            "derives their number for each phase. Leave out one of them, or limit optimizer steps by trainer.max_steps."
        )
    whole = limit == 1.0 if isinstance(limit, float) else limit > 0 and limit % trainer.accumulate_grad_batches == 0
    if not whole or trainer.overfit_batches:
        raise UserError(
            f"trainer.limit_train_batches = {limit} (overfit_batches = {trainer.overfit_batches}) would end within "
            f"an optimizer step. Give a multiple of accumulate_grad_batches = {trainer.accumulate_grad_batches}, "
            "or change data.num_problems and data.num_ppo_epochs instead."
        )
