"""Scheduler of training runs: starts the runs that have no result yet, and shows the progress."""

import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.live import Live

from comparison.plan import Results, Run, Settings, checkpoint_file, read_result, sft_runs
from comparison.workers import Failure, Pool, ready

POLL_SECONDS = 0.5


def run_all(runs: Sequence[Run], shared: Settings, jobs: int) -> tuple[Results, dict[Run, Failure]]:
    """Return the results of the runs and of their SFT runs, and the failures.

    Results of finished runs are read from disk. A failed run stops only the runs that need its checkpoint.
    """
    everything = _in_order([*sft_runs(_seeds(runs)), *runs])
    found = {run: read_result(run, shared) for run in everything}
    waiting = [run for run in everything if found[run] is None]
    waiting = _in_order([*_lost_checkpoints(waiting, shared), *waiting])
    failures = _Scheduler(waiting, len(everything), shared, jobs).run() if waiting else {}
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
        self._num_ended = self._num_shown = 0
        self._started = time.monotonic()
        self._ready_seeds: set[int] = {run.seed for run in waiting} - {run.seed for run in waiting if not run.method}
        self._failures: dict[Run, Failure] = {}
        self._console = Console(stderr=True)

    def run(self) -> dict[Run, Failure]:
        with Pool(self._shared, self._jobs) as pool, Live(console=self._console, auto_refresh=False) as live:
            while self._waiting or pool.running:
                self._start_runs(pool)
                self._show(live, self._status(pool.running))
                for run, failure in pool.finished(POLL_SECONDS):
                    self._record(run, failure)
        return self._failures

    def _start_runs(self, pool: Pool) -> None:
        while pool.has_room:
            run = ready(self._waiting, self._ready_seeds.__contains__)
            if run is None:
                return
            self._waiting.remove(run)
            pool.start(run)

    def _show(self, live: Live, status: str) -> None:
        """Update the status line; without a terminal, print one line per ended run instead."""
        if self._console.is_terminal:
            live.update(status, refresh=True)
        elif self._num_ended != self._num_shown:
            self._num_shown = self._num_ended
            self._print(status)

    def _record(self, run: Run, failure: Failure | None) -> None:
        self._num_ended += 1
        if failure is not None:
            self._fail(run, failure)
        elif run.method is None:
            self._ready_seeds.add(run.seed)
        verdict = "done" if failure is None else f"FAILED: {failure}"
        self._print(f"{run.label}, seed {run.seed}: {verdict}")

    def _fail(self, run: Run, failure: Failure) -> None:
        self._failures[run] = failure
        if run.method is not None:
            return
        for other in [other for other in self._waiting if other.seed == run.seed]:
            self._waiting.remove(other)
            self._num_ended += 1
            self._failures[other] = "its SFT run failed"

    def _status(self, running: Sequence[Run]) -> str:
        done = self._num_before + self._num_ended
        names = ", ".join(f"{run.label}/{run.seed}" for run in running) or "none"
        return f"{done}/{self._num_all} runs ended; running: {names}; {self._remaining(len(running))}"

    def _remaining(self, num_running: int) -> str:
        """Estimate the remaining time from the runs that this process has finished."""
        left = len(self._waiting) + num_running
        if not self._num_ended or not left:
            return "remaining time unknown" if left else "nothing left"
        seconds = (time.monotonic() - self._started) / self._num_ended * left
        return f"about {seconds / 60:.0f} min left"

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
