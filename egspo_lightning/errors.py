"""Exceptions with messages for the user, and helpers that raise and search them."""

import difflib
import signal
from collections.abc import Iterable, Sequence

NUM_SHOWN = 3
"""Faults that an error message lists."""
PASS_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError)
"""Errors that a model's code raises where it cannot compute a pass."""


class UserError(ValueError):
    """A mistake in a config, a flag or a data file. The message has the field, its value, what is allowed, the remedy.

    The command line prints the message without a traceback and exits with code 2.
    """


class RunStopped(SystemExit):
    """A signal ended the run, after it saved a checkpoint.

    Ranks other than the first exit with 0: the first would take another code for a failure and kill itself.
    """

    def __init__(self, number: int, checkpoint: str | None, *, is_first_rank: bool) -> None:
        super().__init__(128 + number if is_first_rank else 0)
        self.number, self.checkpoint = number, checkpoint

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        if self.checkpoint is None:
            return f"Ended by {name}. Checkpoints are off, so nothing was saved."
        return f"Ended by {name}. Saved {self.checkpoint}: resume with the same command and --ckpt_path last."


def cause_of(error: BaseException, *kinds: type[BaseException]) -> BaseException | None:
    """The first exception of the given kinds in the chain of causes of ``error``, itself included; None if none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kinds):
        cause = cause.__cause__ or cause.__context__
    return cause


def listed(faults: Sequence[str]) -> str:
    """The first faults for an error message, and the number of the others."""
    more = f" (and {len(faults) - NUM_SHOWN} more)" if len(faults) > NUM_SHOWN else ""
    return "; ".join(faults[:NUM_SHOWN]) + more


def did_you_mean(name: str, known: Iterable[str], guesses: Iterable[str] = ()) -> str:
    """The most similar name, if one is similar, among the known ones and further guesses; and the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, {*names, *guesses}, n=1, cutoff=0.5)
    return f"{f'Did you mean {close[0]}? ' if close else ''}Known here: {', '.join(names)}"


def require(holds: bool, field: str, value: object, allowed: str) -> None:
    """Refuse the value of a field unless ``holds``.

    Raises:
        UserError: ``holds`` is false.
    """
    if not holds:
        raise UserError(f"{field} must be {allowed}, got {value}.")
