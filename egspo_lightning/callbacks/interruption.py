"""Interruption: saves a checkpoint and exits on SIGINT or SIGTERM."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from egspo_lightning.callbacks.phase_checkpoint import PhaseCheckpoint, is_between_optimizer_steps
from egspo_lightning.callbacks.trainer_access import callbacks_of
from egspo_lightning.errors import RunStopped


class Interruption(Callback):
    """Handles SIGINT (Ctrl-C), SIGTERM and SLURM's requeue signal: the run saves ``last.ckpt`` and exits.

    Every rank first finishes its optimizer step. The exit code is 128 plus the signal's number. A signal during
    sampling takes effect after the first optimizer step on the rollouts. A second signal ends the run at once, and
    keeps the last checkpoint. SLURM's requeue signal (SIGUSR1, or the ``requeue_signal`` of Lightning's
    SLURMEnvironment) saves ``hpc_ckpt_N.ckpt`` and requeues the job; Lightning then resumes from it.

    Args:
        enabled: Whether to handle signals; false leaves them to Lightning, which ends a run without saving.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._received = 0
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers."""
        if not self.enabled or threading.current_thread() is not threading.main_thread():
            return
        self._received = 0
        signals = {signal.SIGINT, signal.SIGTERM, *_requeue_signals(trainer)}
        self._trainer = trainer
        self._handlers = {number: signal.signal(number, self._receive) for number in signals}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the earlier signal handlers."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the earlier signal handlers."""
        self._restore()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the run between two optimizer steps if a rank has received a signal."""
        if is_between_optimizer_steps(trainer):
            self._stop_if_signaled(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run after a phase if a rank has received a signal."""
        self._stop_if_signaled(trainer)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            self._end_at_once(number)
            return
        self._received = number
        self._signal_ranks(number)
        rank_zero_info(f"{signal.Signals(number).name}: the run saves and ends after this optimizer step.")

    def _end_at_once(self, number: int) -> None:
        """End at once. Ranks that Lightning started leave this to the first rank: they may get one signal twice."""
        environment = self._trainer._accelerator_connector.cluster_environment
        if isinstance(environment, LightningEnvironment) and environment.local_rank() > 0:
            return
        self._restore()
        self._signal_ranks(signal.SIGKILL)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.raise_signal(number)

    def _signal_ranks(self, number: int) -> None:
        """Send a signal to the ranks that this process started."""
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.Signals(number))

    def _stop_if_signaled(self, trainer: Trainer) -> None:
        number = self._agreed(trainer) if self.enabled else 0
        if not number:
            return
        if number in _requeue_signals(trainer):
            saved: str | None = str(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
            frame: Any = None  # Lightning's handler, which saves there and requeues the job, does not use it
            trainer._signal_connector._slurm_sigusr_handler_fn(signal.Signals(number), frame)
        else:
            checkpoints = callbacks_of(trainer, PhaseCheckpoint)  # none where checkpoints are switched off
            saved = next((checkpoint.save_now(trainer) for checkpoint in checkpoints), None)
        self._restore()
        raise RunStopped(number, saved, is_first_rank=trainer.is_global_zero)

    def _agreed(self, trainer: Trainer) -> int:
        """The largest signal number that a rank has received; 0 for none. Collective."""
        if trainer.world_size == 1:
            return self._received
        mine = torch.tensor(self._received, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MAX)
        return int(mine)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _requeue_signals(trainer: Trainer) -> set[int]:
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return set()
    return {int(environment.requeue_signal or signal.SIGUSR1)}
