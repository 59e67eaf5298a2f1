"""Runs ``python -m egspo_lightning ...`` in forks of one process that has already imported it.

    python warm_process.py  < requests  > replies

A request is a JSON line with ``arguments``, ``folder``, ``environment``, ``seconds`` and ``file_size`` (the limit of
``ulimit -f``, in bytes). The reply has ``code``, ``seconds``, ``output`` and ``orphans``. Each fork runs the package's
``__main__`` by ``runpy``, as ``python -m`` does, in a session and environment of its own, and exits as an interpreter
does. A new process would only add the import of torch, transformers and lightning, which is most of its time.

This process adopts every process that its forks leave behind, so ``orphans`` holds all that outlive the run.
"""

import ctypes
import json
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
SECONDS_TO_VANISH = 3.0
"""Time limit for a process to exit after its run has ended."""


def serve() -> list[str] | None:
    """Answer requests until input ends; return the command-line arguments in a fork, None in the server."""
    for line in sys.stdin:
        request = json.loads(line)
        log = Path(request["folder"]) / "output.txt"
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            set_up_fork(request, log)
            return list(request["arguments"])
        code = wait(pid, request["seconds"])
        seconds = time.monotonic() - started
        reply = {"code": code, "seconds": seconds, "output": log.read_text(errors="replace"), "orphans": kill_orphans()}
        print(json.dumps(reply), flush=True)
    return None


def set_up_fork(request: dict[str, Any], log: Path) -> None:
    """Set up session, folder, environment, streams and limits as a shell would."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    for number, path, flags in (
        (0, "/dev/null", os.O_RDONLY),
        (1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags, 0o600), number)
    os.dup2(1, 2)
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], resource.RLIM_INFINITY))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  stays open as long as the interpreter runs


def wait(pid: int, seconds: float) -> int | None:
    """Wait for the exit code, as a shell reports it; kill the session and return None after ``seconds``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def kill_orphans() -> list[str]:
    """Kill the processes that the run has left behind and return their command lines."""
    until = time.monotonic() + SECONDS_TO_VANISH
    while (orphans := children()) and time.monotonic() < until:
        time.sleep(0.05)
    names = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in orphans]
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return names


def children() -> list[int]:
    """Reap the children that have exited and return the ids of the others."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return []
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


if __name__ == "__main__":
    import egspo_lightning.cli.main  # noqa: F401  the import that every run needs

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    arguments = serve()
    if arguments is not None:
        sys.argv = ["egspo_lightning", *arguments]
        runpy.run_module("egspo_lightning", run_name="__main__", alter_sys=True)
