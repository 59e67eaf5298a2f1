"""Worker processes that train runs; each worker trains many, because a start costs seconds of imports.

If a worker dies, only its current run fails. If the parent dies, its workers end too.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

from egspo_lightning.cli.comparison.compared_runs import Run, Settings
from egspo_lightning.errors import RunStopped, UserError, cause_of

REUSE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""Make glibc reuse memory instead of mapping each tensor anew; a quickstart phase takes a tenth less time."""

SECONDS_TO_END = 5.0
"""Time in which a worker may end by itself before it is killed."""

Failure = str
"""Message that says why a run failed."""

Task = Literal["check", "train"]


class Pool:
    """Pool of workers. A context manager: its exit ends all workers."""

    def __init__(self, shared: Settings, jobs: int) -> None:
        self._shared, self._jobs = shared, jobs
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Pool":
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # torch reads them at import
            os.environ[name] = str(self._shared.threads)
        for name, value in REUSE_MEMORY.items():
            os.environ.setdefault(name, value)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        for worker in self._workers:
            worker.wait()
        self._workers = []

    @property
    def running(self) -> list[Run]:
        """Runs in progress."""
        return [worker.run for worker in self._workers if worker.run is not None]

    @property
    def has_room(self) -> bool:
        """Whether another run can start."""
        return len(self.running) < self._jobs

    def start(self, run: Run) -> None:
        """Send a run to an idle worker, or to a new one."""
        self._idle().start(run, "train")

    def check(self, run: Run) -> Failure | None:
        """Build a run in a worker and train nothing; returns why it cannot be trained."""
        worker = self._idle()
        worker.start(run, "check")
        failure = worker.receive()
        if not worker.is_alive:
            self._workers.remove(worker)
        return failure

    def _idle(self) -> "_Worker":
        idle = next((worker for worker in self._workers if worker.run is None), None)
        if idle is None:
            idle = _Worker(self._shared)
            self._workers.append(idle)
        return idle

    def finished(self, timeout: float) -> Iterator[tuple[Run, Failure | None]]:
        """Yield the runs that end within ``timeout`` seconds, each with its failure or None."""
        busy = {worker.connection: worker for worker in self._workers if worker.run is not None}
        for connection in wait(list(busy), timeout):
            assert isinstance(connection, Connection)
            worker = busy[connection]
            run = worker.run
            assert run is not None
            failure = worker.receive()
            if not worker.is_alive:
                self._workers.remove(worker)
            yield run, failure


class _Worker:
    """A process and its current run."""

    def __init__(self, shared: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.run: Run | None = None
        self._process = context.Process(target=_work, args=(theirs, shared), daemon=False)
        self._process.start()
        theirs.close()  # otherwise recv would not notice the end of the process
        self.is_alive = True

    def start(self, run: Run, task: Task) -> None:
        self.run = run
        with contextlib.suppress(OSError):  # it died while idle; receive() reports that
            self.connection.send((run, task))

    def receive(self) -> Failure | None:
        self.run = None
        try:
            failure: Failure | None = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(SECONDS_TO_END)
            self.is_alive = False
            return f"its process ended with exit code {self._process.exitcode}"
        return failure

    def end(self) -> None:
        self.connection.close()
        self._process.terminate()

    def wait(self) -> None:
        self._process.join(SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(connection: Connection, shared: Settings) -> None:
    """Main loop of a worker: receive a run, train or check it, send the failure or None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            run, task = connection.recv()
        except (EOFError, OSError):
            return
        log = run.log_file(shared.output)
        _log_to(log)
        connection.send(attempt(partial(_do, run, shared, task), log))


def _do(run: Run, shared: Settings, task: Task) -> None:
    from egspo_lightning.cli.comparison import run_check, run_in_worker  # not in the parent: they import torch

    (run_check.check if task == "check" else run_in_worker.execute)(run, shared)


def attempt(action: Callable[[], None], log: Path) -> Failure | None:
    """Do a task. On failure, print the traceback, which goes to the log, and return a message of one line."""
    try:
        action()
    except (Exception, SystemExit) as error:
        if _is_signal(error):
            raise
        failure = _printed(log) if isinstance(error, SystemExit) else _cause(error)
        traceback.print_exc()
        return failure
    return None


def _is_signal(error: BaseException) -> bool:
    """Whether SIGTERM ended the run; the class of Lightning is not imported in the parent."""
    return isinstance(error, RunStopped) or type(error).__name__ == "SIGTERMException"


def _printed(log: Path) -> Failure:
    """The parser's error message, which it prints before SystemExit, as one line."""
    sys.stderr.flush()
    text = log.read_text(encoding="utf-8", errors="replace").rpartition("error: ")[2]
    return " ".join(text.split()) or "its process exited"


def _cause(error: Exception) -> str:
    """Message of the UserError among the causes, or else the error with its type."""
    cause = cause_of(error, UserError)
    return str(cause) if cause is not None else f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _log_to(path: Path) -> None:
    """Redirect stdout and stderr of this process, including native libraries, to a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def ready(waiting: Sequence[Run], has_checkpoint: Callable[[int], bool]) -> Run | None:
    """The next run that can start: an SFT run, or a run whose SFT checkpoint exists."""
    return next((run for run in waiting if run.method is None or has_checkpoint(run.seed)), None)
