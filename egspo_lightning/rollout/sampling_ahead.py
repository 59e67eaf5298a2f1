"""Sampling ahead: a thread samples the next rollout batch from a snapshot of the policy."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from egspo_lightning.rollout.policy_protocol import FrozenPolicy, RolloutPolicy
from egspo_lightning.rollout.rollout_records import ScoredGroups, pack, unpack

Prepare = Callable[[RolloutPolicy], ScoredGroups]

PATIENCE_S = 10.0
"""Time that ``drop`` waits for a user's reward, which cannot be canceled."""


class SamplingAhead:
    """Holds at most one rollout batch: in progress, complete, or from a checkpoint.

    The rollout batch is held packed, on the CPU, as in a checkpoint. So it is the same after a resume.
    """

    def __init__(self) -> None:
        self._making: Future[dict[str, Any]] | None = None
        self._thread: threading.Thread | None = None
        self._policy: FrozenPolicy | None = None
        self.saved: dict[str, Any] | None = None
        """The packed rollout batch of a checkpoint, until ``take``."""

    @property
    def is_there(self) -> bool:
        """Whether a rollout batch is held, complete or in progress."""
        return self._making is not None or self.saved is not None

    def start(self, policy: FrozenPolicy, prepare: Prepare) -> None:
        """Start to make a rollout batch in a thread; none may be held."""
        assert not self.is_there

        def make(future: Future[dict[str, Any]]) -> None:
            try:
                with policy.apart():
                    future.set_result(pack(prepare(policy)))
            except BaseException as error:
                future.set_exception(error)

        self._policy, self._making = policy, Future()
        # a daemon: a reward that hangs does not keep the process alive
        self._thread = threading.Thread(target=make, args=(self._making,), name="sampling-ahead", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise an error of the thread now, rather than when the rollout batch is needed.

        Raises:
            Exception: the error of the thread.
        """
        if self._making is not None and self._making.done():
            self._making.result()

    def packed(self) -> dict[str, Any] | None:
        """Wait for the packed rollout batch, for a checkpoint; None where none is held.

        Raises:
            Exception: the error of the thread.
        """
        return self.saved if self._making is None else self._making.result()

    def take(self, device: torch.device) -> ScoredGroups | None:
        """Wait for the rollout batch and hand it over, on a device; None where none is held.

        Raises:
            Exception: the error of the thread.
        """
        started = time.perf_counter()
        packed = self.packed()
        waited = {"time/wait": (time.perf_counter() - started, 1.0)}
        self._making = self.saved = None
        if packed is None:
            return None
        scored = unpack(ScoredGroups, packed, device)
        return scored._replace(measurements={**scored.measurements, **waited})

    def cancel(self) -> None:
        """Cancel the sampling in progress; ``drop`` waits for its end."""
        if self._policy is not None:
            self._policy.cancel()

    def drop(self) -> None:
        """Cancel the sampling in progress, wait for its end, and hold nothing. Its exceptions are discarded on purpose.

        A user's reward that takes longer than ``PATIENCE_S`` is not waited for, and ends with the process.
        """
        self.cancel()
        if self._thread is not None:
            self._thread.join(PATIENCE_S)
        self._making = self.saved = None
