"""Exit codes and error messages of failed runs.

A user's mistake is reported in one message with exit code 2, a fault of the machine (a full disk, a missing package)
with exit code 1. Any other exception is a bug of this package: its traceback is printed, since the log may be all that
is left of a long job. ``--debug`` shows the traceback of every exception.
"""

import errno
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.checkpoint.api import CheckpointException

from egspo_lightning.errors import UserError, cause_of

DEBUG = "--debug"
MISTAKE, FAULT, BUG = 2, 1, 1
FAULTS = {
    errno.ENOSPC: "Free some space, then resume with --ckpt_path last: it is whole",
    errno.EDQUOT: "Your quota is used up. Free some space, then resume with --ckpt_path last",
    errno.EFBIG: "A limit on the size of files (ulimit -f) is reached. Raise it, then resume with --ckpt_path",
    errno.EACCES: "Give a folder that you may write to",
    errno.EPERM: "Give a folder that you may write to",
    errno.ENOENT: "Something has removed or never made it. Give another path, or make it",
    errno.ENOTDIR: "A file stands where a folder should be. Give another folder",
    errno.EISDIR: "A folder stands where a file should be. Give another path",
    errno.EEXIST: "Something else stands there. Give another path",
    errno.EROFS: "The file system is read-only. Give another folder",
    errno.EIO: "The disk does not answer. Resume elsewhere with --ckpt_path last",
    errno.EADDRINUSE: "Another program listens at MASTER_PORT. Unset it, or give a free one",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.ENOMEM: "Lower the batch sizes, or give the job more memory",
}
"""Suggested fixes by errno."""


class Ending(NamedTuple):
    """Message and exit code of an exception."""

    text: str
    code: int
    is_foreseen: bool = True


def take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Remove ``--debug``, which may stand anywhere; returns the other arguments, and whether it was there."""
    return [argument for argument in arguments if argument != DEBUG], DEBUG in arguments


def end(error: BaseException, *, debug: bool) -> int:
    """Print how the run ended; returns the exit code."""
    ending = judge(error)
    if debug or not ending.is_foreseen:
        traceback.print_exception(error)
    print(f"error: {ending.text}", file=sys.stderr, flush=True)
    return ending.code


def judge(error: BaseException) -> Ending:
    """Classify an exception: a signal, a mistake of the user, a fault of the machine, or a bug."""
    if isinstance(error, SIGTERMException):  # Lightning's own exit code would be 0
        return Ending("ended by SIGTERM. Resume with --ckpt_path last.", 128 + signal.SIGTERM)
    if isinstance(error, CheckpointException):
        return Ending(_sharded(error), MISTAKE)
    told = cause_of(error, UserError, MisconfigurationException)  # jsonargparse wraps mistakes within lists
    if told is not None and isinstance(error, (ValueError, MisconfigurationException)):
        return Ending(str(told), MISTAKE)
    if isinstance(error, ModuleNotFoundError):
        return Ending(f"a package is missing: {error}. Install it: pip install {error.name}", FAULT)
    if isinstance(error, ValueError) and _raised_in(error, "jsonargparse"):
        return Ending(f"config: {error}", MISTAKE)
    if isinstance(error, ValueError) and _raised_in(error, "lightning.fabric.plugins.environments"):
        return Ending(f"environment: {error}", MISTAKE)
    fault = cause_of(error, OSError)
    if isinstance(fault, OSError) and fault.errno in FAULTS:
        where = f": {fault.filename}" if fault.filename else ""
        return Ending(f"{fault.strerror}{where}. {FAULTS[fault.errno]}. ({DEBUG} shows what was going on.)", FAULT)
    kind = type(error).__name__
    return Ending(f"unforeseen, a mistake of this program: {kind}. Report it with the traceback above.", BUG, False)


def _sharded(error: CheckpointException) -> str:
    reason = str(next(iter(error.failures.values()))[0]).splitlines()[0]
    return (
        f"ckpt_path: this sharded checkpoint does not fit the run: {reason} Start from one with the same networks: "
        "model.policy, model.critic, model.objective.beta and model.kl_reward decide on them."
    )


def _raised_in(error: BaseException, package: str) -> bool:
    """Whether the package itself raised the error, rather than code that it called."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and f"{frames[-1][0].f_globals.get('__name__')}.".startswith(f"{package}.")
