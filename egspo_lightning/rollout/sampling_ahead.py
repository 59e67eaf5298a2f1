"""The collection after the one in training, made meanwhile in a thread from a snapshot of the policy."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from egspo_lightning.rollout.policy_protocol import FrozenPolicy, RolloutPolicy
from egspo_lightning.rollout.rollout_state import pack, unpack_scored
from egspo_lightning.rollout.scoring import ScoredGroups

Prepare = Callable[[RolloutPolicy], ScoredGroups]

PATIENCE_S = 10.0
"""How long ``drop`` waits for a reward that is the user's own, and cannot be ended."""


class SamplingAhead:
    """Holds one collection at most: one that is being made, has been made, or was in a checkpoint.

    It is held packed, as a checkpoint holds it: on the CPU, and the same whether it comes from there or not.
    """

    def __init__(self) -> None:
        self._making: Future[dict[str, Any]] | None = None
        self._thread: threading.Thread | None = None
        self._policy: FrozenPolicy | None = None
        self.saved: dict[str, Any] | None = None
        """The collection of a checkpoint, packed, until it is taken."""
        self.seconds_waited = 0.0
        """Time in which ``take`` had nothing to do but wait, the last time."""

    @property
    def is_there(self) -> bool:
        """Whether a collection is held, made or not."""
        return self._making is not None or self.saved is not None

    def start(self, policy: FrozenPolicy, prepare: Prepare) -> None:
        """Begin to make one; nothing may be held."""
        assert not self.is_there

        def make() -> dict[str, Any]:
            with policy.apart():
                return pack(prepare(policy))

        self._policy, self._making = policy, Future()
        # a daemon: a reward that hangs does not keep the process of a run that has ended
        self._thread = threading.Thread(target=_settle, args=(self._making, make), name="lookahead", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Let an error come up where training is, rather than when the collection is needed.

        Raises:
            Exception: what making the collection has raised.
        """
        if self._making is not None and self._making.done():
            self._making.result()

    def packed(self) -> dict[str, Any] | None:
        """The collection for a checkpoint, made to its end; None where none is held.

        Raises:
            Exception: what making the collection has raised.
        """
        return self.saved if self._making is None else self._making.result()

    def take(self, device: torch.device) -> ScoredGroups | None:
        """The collection, made to its end, on a device; it is held no longer. None where none is.

        Raises:
            Exception: what making the collection has raised.
        """
        started = time.perf_counter()
        packed = self.packed()
        self.seconds_waited = time.perf_counter() - started
        self._making = self.saved = None
        return None if packed is None else unpack_scored(packed, device)

    def cancel(self) -> None:
        """Have what is being made end early; ``drop`` waits for it."""
        if self._policy is not None:
            self._policy.cancel()

    def drop(self) -> None:
        """Hold nothing any more; what is being made has ended when this returns, and its error is nobody's.

        A user's reward that goes on for longer than ``PATIENCE_S`` is left behind, and ends with the process.
        """
        self.cancel()
        if self._thread is not None:
            self._thread.join(PATIENCE_S)
        self._making = self.saved = None


def _settle(future: Future[dict[str, Any]], make: Callable[[], dict[str, Any]]) -> None:
    """Call, and give the future what comes of it."""
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)
