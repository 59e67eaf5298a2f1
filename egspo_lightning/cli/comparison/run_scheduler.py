"""Scheduler of training runs: checks and starts the runs that have no result yet, and shows the progress."""

import json
import shutil
import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from egspo_lightning.cli.comparison.compared_runs import Results, Run, Settings, checkpoint_file, sft_runs
from egspo_lightning.cli.comparison.stored_results import read_result
from egspo_lightning.cli.comparison.worker_pool import Failure, Pool, ready
from egspo_lightning.errors import UserError

POLL_SECONDS = 0.5


def run_all(runs: Sequence[Run], shared: Settings, jobs: int) -> tuple[Results, dict[Run, Failure]]:
    """Return the results of the runs and of their SFT runs, and the failures.

    Results of finished runs are read from disk. A failed run stops only the runs that need its checkpoint.

    Raises:
        UserError: a run has finished with other settings, or a config, a method or a flag cannot be built.
    """
    everything = _in_order([*sft_runs(_seeds(runs)), *runs])
    found = {run: read_result(run, shared) for run in everything}
    waiting = [run for run in everything if found[run] is None]
    waiting = _in_order([*_lost_checkpoints(waiting, shared), *waiting])
    failures = _Scheduler(waiting, len(everything), shared, jobs).run() if waiting else {}
    if not failures:
        shutil.rmtree(shared.output / "unfinished", ignore_errors=True)
    results = {run: result for run in everything if (result := read_result(run, shared)) is not None}
    return results, failures


def _seeds(runs: Iterable[Run]) -> list[int]:
    return list(dict.fromkeys(run.seed for run in runs))


def _in_order(runs: Iterable[Run]) -> list[Run]:
    """The distinct runs, seed by seed with SFT first, so that whole seeds finish early."""
    distinct = list(dict.fromkeys(runs))
    seeds = _seeds(distinct)
    return sorted(distinct, key=lambda run: (seeds.index(run.seed), run.method is not None))


def _lost_checkpoints(waiting: Iterable[Run], shared: Settings) -> list[Run]:
    """The SFT runs whose checkpoint is needed but has been deleted."""
    return [run for run in sft_runs(_seeds(waiting)) if not checkpoint_file(shared.output, run.seed).exists()]


class _Scheduler:
    def __init__(self, waiting: list[Run], num_all: int, shared: Settings, jobs: int) -> None:
        self._waiting, self._shared, self._jobs = waiting, shared, jobs
        self._num_all, self._num_before = num_all, max(num_all - len(waiting), 0)
        self._num_ended = 0
        self._started = time.monotonic()
        self._ready_seeds: set[int] = {run.seed for run in waiting} - {run.seed for run in waiting if not run.method}
        self._failures: dict[Run, Failure] = {}
        self._display = _Display(num_all)

    def run(self) -> dict[Run, Failure]:
        with Pool(self._shared, self._jobs) as pool, self._display:
            self._check(pool)
            self._started = time.monotonic()
            while self._waiting or pool.running:
                self._start_runs(pool)
                for run, failure in pool.finished(POLL_SECONDS):
                    self._record(run, failure)
                self._show(pool.running)
        return self._failures

    def _check(self, pool: Pool) -> None:
        """Build one run of each method."""
        one_each = {run.method: run for run in reversed(self._waiting)}
        for run in sorted(one_each.values(), key=self._waiting.index):
            failure = pool.check(run)
            if failure is not None:
                where = "--config" if run.method is None else f"--methods: {run.label}"
                raise UserError(f"{where}: {failure}")

    def _start_runs(self, pool: Pool) -> None:
        while pool.has_room:
            run = ready(self._waiting, self._ready_seeds.__contains__)
            if run is None:
                return
            self._waiting.remove(run)
            pool.start(run)

    def _record(self, run: Run, failure: Failure | None) -> None:
        self._num_ended += 1
        if failure is not None:
            self._fail(run, failure)
            self._display.print(f"{run.label}, seed {run.seed}: FAILED: {failure}")
            return
        if run.method is None:
            self._ready_seeds.add(run.seed)
        result = read_result(run, self._shared) or {}
        self._display.print(
            f"{run.label}, seed {run.seed}: accuracy {result['accuracy']:.3f} "
            f"({self._num_done} of {self._num_all} runs ended)"
        )

    def _fail(self, run: Run, failure: Failure) -> None:
        self._failures[run] = failure
        if run.method is not None:
            return
        for other in [other for other in self._waiting if other.seed == run.seed]:
            self._waiting.remove(other)
            self._num_ended += 1
            self._failures[other] = "its SFT run failed"

    @property
    def _num_done(self) -> int:
        return self._num_before + self._num_ended

    def _show(self, running: Sequence[Run]) -> None:
        progress = {run: read_progress(run, self._shared) for run in running}
        done = self._num_ended + sum(done / num for done, num in progress.values())
        left = len(self._waiting) + len(running) + self._num_ended - done
        seconds = (time.monotonic() - self._started) / done * left if done else None
        note = "remaining time unknown" if seconds is None else f"about {seconds / 60:.0f} min left"
        self._display.update(self._num_done, note, progress)


def read_progress(run: Run, shared: Settings) -> tuple[int, int]:
    """Finished phases of a run in progress, and all of its phases; (0, 1) before the first one ends."""
    try:
        done, num = json.loads(run.progress_file(shared.output).read_text())
    except FileNotFoundError:
        return 0, 1
    return min(done, num), num


class _Display:
    """Progress bars on a terminal, one for all runs and one for each run in progress; elsewhere lines of text."""

    def __init__(self, num_all: int) -> None:
        self._console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn()
        note, is_terminal = TextColumn("{task.fields[note]}"), self._console.is_terminal
        self._bars = Progress(*columns, note, console=self._console, disable=not is_terminal, transient=True)
        self._all = self._bars.add_task("all runs", total=num_all, note="checking config and methods")
        self._tasks: dict[Run, TaskID] = {}

    def __enter__(self) -> None:
        self._bars.start()

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def print(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, num_done: int, note: str, progress: dict[Run, tuple[int, int]]) -> None:
        """Show the number of ended runs, a note, and the finished and all phases of the runs in progress."""
        self._bars.update(self._all, completed=num_done, note=note)
        for run in self._tasks.keys() - progress.keys():
            self._bars.remove_task(self._tasks.pop(run))
        for run, (done, num) in progress.items():
            if run not in self._tasks:
                self._tasks[run] = self._bars.add_task(f"  {run.label}, seed {run.seed}", note="")
            self._bars.update(self._tasks[run], completed=done, total=num)
