"""The exceptions that speak to the user."""

import signal


class UserError(ValueError):
    """A mistake in a config, a flag or a data file, told as: what came, what is allowed, what to do.

    The command line prints its text and ends with exit code 2, without a traceback.
    """


class RunStopped(SystemExit):
    """A run was ended from outside, and has saved.

    Args:
        number: The signal's.
        checkpoint: What to resume from, if anything was saved.
        is_first_rank: Whether this process has the exit code; others end with 0, for the first one would take another
            code for a fault of theirs, and kill itself.
    """

    def __init__(self, number: int, checkpoint: str | None, *, is_first_rank: bool) -> None:
        super().__init__(128 + number if is_first_rank else 0)
        self.number, self.checkpoint = number, checkpoint

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.checkpoint is None:
            return f"ended by {name}; checkpoints are switched off, so nothing was saved."
        return f"ended by {name}. Saved {self.checkpoint}: resume with the same command and --ckpt_path last."


def cause_of(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    """The first of the given kinds that an error is, or was raised from, however deeply libraries have wrapped it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kinds):
        cause = cause.__cause__ or cause.__context__
    return cause


def require(holds: bool, field: str, value: object, allowed: str) -> None:
    """Refuse the value of a field.

    Raises:
        UserError: ``holds`` is false.
    """
    if not holds:
        raise UserError(f"{field} must be {allowed}, got {value}.")
