"""Exit codes and error messages of failed runs.

A user's mistake is reported in one message with exit code 2, a fault of the machine (a full disk, a missing package)
with exit code 1. An exception in the user's own code (a reward, gate, engine, source, callback ...) is reported in one
message with the lines of that code. Any other exception is a bug of this package: its traceback is printed, since the
log may be all that is left of a long job. ``--debug`` shows the traceback of every exception.
"""

import errno
import signal
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.checkpoint.api import CheckpointException

import egspo_lightning
from egspo_lightning.cli.parser import missing_package
from egspo_lightning.errors import UserError, cause_of

DEBUG = "--debug"
MISTAKE, FAULT, BUG = 2, 1, 1
FAULTS = {
    errno.ENOSPC: "Free disk space, then resume with --ckpt_path last: the last checkpoint is complete",
    errno.EDQUOT: "The disk quota is used up. Free disk space, then resume with --ckpt_path last",
    errno.EFBIG: "Raise the limit on file size (ulimit -f), then resume with --ckpt_path last",
    errno.EACCES: "Give a folder that you can write to",
    errno.EPERM: "Give a folder that you can write to",
    errno.ENOENT: "Create it, or give another path",
    errno.ENOTDIR: "Part of the path is a file. Give a folder",
    errno.EISDIR: "Give the path of a file",
    errno.EEXIST: "Delete it, or give another path",
    errno.EROFS: "Give a folder on a file system that is not read-only",
    errno.EIO: "The disk may be failing. Copy the checkpoints to another disk, then resume with --ckpt_path last",
    errno.EADDRINUSE: "Another program uses the port. Set MASTER_PORT to a free port, or unset it",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
    errno.ENOMEM: "Use smaller batches, or give the job more memory",
}
"""Suggested fixes by errno."""
PACKAGE = Path(egspo_lightning.__file__).parent
LIBRARIES = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}


class Ending(NamedTuple):
    """Message and exit code of an exception."""

    text: str
    code: int
    is_foreseen: bool = True


def end(error: BaseException, *, debug: bool) -> int:
    """Print how the run ended; returns the exit code."""
    ending = judge(error)
    if debug or not ending.is_foreseen:
        traceback.print_exception(error)
    print(ending.text, file=sys.stderr, flush=True)
    return ending.code


def judge(error: BaseException) -> Ending:
    """Classify an exception: a signal, a mistake of the user, a fault of the machine, the user's code, or a bug."""
    if isinstance(error, SIGTERMException):  # Lightning's own exit code would be 0
        return Ending("Ended by SIGTERM. Resume with --ckpt_path last.", 128 + signal.SIGTERM)
    if isinstance(error, KeyboardInterrupt):  # outside fit; the terminal shows ^C on the last line
        return Ending("\nEnded by SIGINT.", 128 + signal.SIGINT)
    ending = _judge_failure(error)
    return ending._replace(text=f"error: {ending.text}")


def _judge_failure(error: BaseException) -> Ending:
    if isinstance(error, CheckpointException):
        return Ending(_sharded(error), MISTAKE)
    mistake = cause_of(error, UserError, MisconfigurationException)  # jsonargparse wraps mistakes within lists
    if mistake is not None and isinstance(error, (ValueError, MisconfigurationException)):
        return Ending(str(mistake), MISTAKE)
    if isinstance(error, ModuleNotFoundError):
        return Ending(f"a package is missing: {error}. Install it: pip install {error.name}", FAULT)
    if package := missing_package(str(error)) if isinstance(error, ValueError) else "":
        return Ending(package, FAULT)
    if isinstance(error, ValueError) and _raised_in(error, "jsonargparse"):
        return Ending(f"config: {error}", MISTAKE)
    if isinstance(error, ValueError) and _raised_in(error, "lightning.fabric.plugins.environments"):
        return Ending(f"environment: {error}", MISTAKE)
    fault = cause_of(error, OSError)
    if isinstance(fault, OSError) and fault.errno in FAULTS:
        where = f": {fault.filename}" if fault.filename else ""
        return Ending(f"{fault.strerror}{where}. {FAULTS[fault.errno]}. ({DEBUG} shows the traceback.)", FAULT)
    if lines := _user_lines(error):
        what = traceback.format_exception_only(error)[-1].strip()
        return Ending(f"{what}\nYour own code raised it:\n{lines}({DEBUG} shows the whole traceback.)", MISTAKE)
    kind = type(error).__name__
    return Ending(f"{kind} is a bug of this program. Report it with the traceback above.", BUG, False)


def _user_lines(error: BaseException | None) -> str:
    """The lines of the user's code in the traceback of an exception or of its causes; empty if there are none."""
    while error is not None:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(Path(frame.filename))]
        if own:
            return "".join(traceback.format_list(own))
        error = error.__cause__ or error.__context__
    return ""


def _is_users(file: Path) -> bool:
    """Whether a source file is neither of this package, nor of an installed one, nor of Python."""
    is_installed = bool({"site-packages", "dist-packages"} & set(file.parts))
    return file.is_file() and not is_installed and not {PACKAGE, *LIBRARIES} & set(file.parents)


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
