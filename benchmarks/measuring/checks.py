"""Independent checks, each in a process and within a time budget of its own: a failing check does not end the others.

Imports no torch, so that the process of a check imports only what the check needs.
"""

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

OK = "ok"


class Range(NamedTuple):
    """Reference values, both ends included."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        if self.low == -math.inf:
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"


class Record(NamedTuple):
    """One measured quantity."""

    quantity: str
    value: float
    unit: str = ""
    reference: Range | None = None
    """None: the value is reported, and always accepted."""

    @property
    def result(self) -> str:
        """``ok``, or why the value fails; NaN lies in no range."""
        is_inside = self.reference is None or self.reference.low <= self.value <= self.reference.high
        return OK if is_inside else f"failed: {self.value:.3g} is not {self.reference}"


class Check(NamedTuple):
    """A function that measures, with what it needs bound to it.

    Args:
        measure: Picklable; runs in a new process.
        budget: Most seconds that the process may run.
        skipped: The reason why it does not run here, or None.
    """

    name: str
    measure: Callable[[], Sequence[Record]]
    budget: float
    skipped: str | None = None


def run_checks(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Run all checks in order; one table row for each record, or for each check that is skipped or gives none."""
    return [row for check in checks for row in _rows(check)]


def has_failed(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether any row reports a failure."""
    return any(row["result"].startswith("failed") for row in rows)


def _rows(check: Check) -> list[dict[str, Any]]:
    if check.skipped is not None:
        return [_row(check.name, "", "", "", "", f"skipped: {check.skipped}")]
    print(f"{check.name} (at most {check.budget:g} s) ...", flush=True)
    started = time.monotonic()
    found = _measured(check)
    print(f"{check.name}: {time.monotonic() - started:.0f} s", flush=True)
    if isinstance(found, str):
        return [_row(check.name, "", "", "", "", f"failed: {found}")]
    return [_row(check.name, r.quantity, r.value, r.unit, str(r.reference or ""), r.result) for r in found]


def _row(*cells: Any) -> dict[str, Any]:
    return dict(zip(("check", "quantity", "value", "unit", "reference", "result"), cells, strict=True))


def _measured(check: Check) -> Sequence[Record] | str:
    """Records of the check, or one line on why there are none."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(check.measure, sender))
    process.start()
    sender.close()  # otherwise the death of the process would not end the wait
    try:
        if not receiver.poll(check.budget):
            return f"not done after {check.budget:g} s"
        found: Sequence[Record] | str = receiver.recv()
        return found or "measured nothing"
    except EOFError:
        process.join()
        return f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _report(measure: Callable[[], Sequence[Record]], sender: Connection) -> None:
    """Send the records, or the error as one line after its traceback is printed."""
    try:
        sender.send(list(measure()))
    except Exception as error:
        lines = str(error).strip().splitlines()
        sender.send(f"{type(error).__name__}: {lines[0] if lines else ''}")
        raise
