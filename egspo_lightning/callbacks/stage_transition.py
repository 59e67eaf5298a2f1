"""Decides when SFT ends, and carries the policy over into stage EGSPO."""

import math
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from egspo_lightning.callbacks.math_benchmark import MathBenchmark
from egspo_lightning.callbacks.phase_checkpoint import save_whole
from egspo_lightning.callbacks.trainer_access import module_of
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.types import Stage


class StageTransition(Callback):
    """Ends stage SFT after a number of epochs, or when a monitored metric is good enough or stops improving.

    Whichever condition holds first counts; without any, SFT is one epoch. At the transition the SFT policy becomes the
    reference (where beta > 0), the optimizer may start anew, and a checkpoint ``sft.ckpt`` is written from which stage
    EGSPO can be started.

    Args:
        after_epochs: Epochs of SFT at most; null leaves it to the monitored metric.
        monitor: Name of a logged metric, such as loss/sft. One of MathBenchmark (eval/...) is judged when it is
            measured, so math_benchmark.every_n_epochs must be set.
        mode: Whether smaller (min) or larger (max) values are better.
        target: Value of the metric that is good enough.
        patience: Epochs without an improvement after which SFT ends.
        min_delta: Least change that counts as an improvement.
        reset_optimizer: Forget the optimizer's moments and start its schedule anew.
        learning_rate: Learning rate of stage EGSPO; null is that of the optimizer's config. Needs reset_optimizer.
        save_checkpoint: Whether to write sft.ckpt into the log folder.
        enabled: Whether SFT ends at all; false is SFT alone.
    """

    def __init__(
        self,
        after_epochs: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        target: float | None = None,
        patience: int | None = None,
        min_delta: float = 0.0,
        reset_optimizer: bool = True,
        learning_rate: float | None = None,
        save_checkpoint: bool = True,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        for field, value in (("after_epochs", after_epochs), ("patience", patience)):
            if value is not None and value < 1:
                raise UserError(f"stage_transition.{field} must be at least 1, or null, got {value}.")
        if monitor is None and (target is not None or patience is not None):
            raise UserError("stage_transition.target and .patience need stage_transition.monitor, the metric's name.")
        if monitor is not None and target is None and patience is None:
            raise UserError("stage_transition.monitor needs stage_transition.target, .patience, or both.")
        if learning_rate is not None and not 0 < learning_rate < math.inf:
            raise UserError(f"stage_transition.learning_rate must be above 0, or null, got {learning_rate}.")
        if learning_rate is not None and not reset_optimizer:
            raise UserError("stage_transition.learning_rate needs stage_transition.reset_optimizer: true.")
        self.after_epochs = 1 if after_epochs is None and monitor is None else after_epochs
        self.monitor, self.mode, self.enabled = monitor, mode, enabled
        self.target, self.patience, self.min_delta = target, patience, min_delta
        self.reset_optimizer, self.learning_rate, self.save_checkpoint = (
            reset_optimizer,
            learning_rate,
            save_checkpoint,
        )
        self.num_epochs = self.num_bad_epochs = 0
        self.best: float | None = None
        self.reason: str | None = None
        """Why SFT ended, where it ended in this run."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that starts where SFT ended takes its own learning rate, and starts its own critic."""
        module = module_of(pl_module)
        has_left_sft = module.stage == Stage.EGSPO or module.entered_step > 0
        if has_left_sft and module.entered_step == trainer.global_step:
            module.branch_off()
            self._restart(module)
        left, most = (self.after_epochs or 0) - self.num_epochs, trainer.max_epochs or -1
        if self.enabled and module.stage == Stage.SFT and 0 < most <= trainer.current_epoch + left:
            rank_zero_warn(
                f"trainer.max_epochs = {most} ends within stage SFT (stage_transition.after_epochs = "
                f"{self.after_epochs}): there will be no phase of EGSPO. Raise max_epochs, or set "
                "stage_transition.enabled: false to say that SFT alone is meant."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """SFT alone goes on with SFT, also from a checkpoint at which another run left it."""
        if not self.enabled:
            module_of(pl_module).stage = Stage.SFT

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to wait for a benchmark that is not measured, and SFT alone that would begin after SFT."""
        if stage == TrainerFn.FITTING and not self.enabled and module_of(pl_module).stage == Stage.EGSPO:
            raise UserError(
                "stage_transition.enabled: false is SFT alone, but model.initial_stage: egspo leaves SFT out. Set one "
                "of them otherwise."
            )
        benchmark = _benchmark(trainer)
        is_measured = benchmark is not None and benchmark.every_n_epochs > 0
        if self.monitor is not None and self.monitor.startswith("eval/") and not is_measured:
            raise UserError(
                f"stage_transition.monitor is {self.monitor!r}, but math_benchmark.every_n_epochs is 0, so it is not "
                "measured during SFT. Set it to 1 or more."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide the stage of the next epoch, since its loader is asked for before it starts."""
        if not self.enabled or module_of(pl_module).stage != Stage.SFT:
            return
        self.num_epochs += 1
        reason = self._reason(trainer)
        if trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
            self._enter_egspo(trainer, module_of(pl_module), reason or "another rank decided so")

    def _reason(self, trainer: Trainer) -> str | None:
        """Why SFT should end now, or None."""
        if self.monitor is not None and self._is_fresh(trainer):
            reason = self._judge(self._monitored(trainer))
            if reason is not None:
                return reason
        if self.after_epochs is not None and self.num_epochs >= self.after_epochs:
            return f"{self.num_epochs} epochs done"
        return None

    def _is_fresh(self, trainer: Trainer) -> bool:
        """Whether the monitored value is of this epoch; benchmarks may be measured more rarely."""
        assert self.monitor is not None
        benchmark = _benchmark(trainer)
        return not self.monitor.startswith("eval/") or benchmark is None or benchmark.latest_step == trainer.global_step

    def _monitored(self, trainer: Trainer) -> float:
        assert self.monitor is not None
        if self.monitor not in trainer.callback_metrics:
            raise UserError(
                f"stage_transition.monitor: no metric {self.monitor!r} was logged. Logged so far: "
                f"{', '.join(sorted(trainer.callback_metrics))}."
            )
        return float(trainer.callback_metrics[self.monitor])

    def _judge(self, value: float) -> str | None:
        sign = 1 if self.mode == "max" else -1
        if self.target is not None and sign * (value - self.target) >= 0:
            return f"{self.monitor} = {value:.4g} has reached {self.target:.4g}"
        if self.best is None or sign * (value - self.best) > self.min_delta:
            self.best, self.num_bad_epochs = value, 0
        else:
            self.num_bad_epochs += 1
        if self.patience is not None and self.num_bad_epochs >= self.patience:
            return f"{self.monitor} has not improved on {self.best:.4g} for {self.num_bad_epochs} epochs"
        return None

    def _enter_egspo(self, trainer: Trainer, module: EGSPOModule, reason: str) -> None:
        self.reason = reason
        module.stage = Stage.EGSPO
        module.branch_off()
        self._restart(module)
        log_dir = trainer.log_dir
        if self.save_checkpoint and log_dir is not None:
            save_whole(trainer, Path(log_dir) / "sft.ckpt")
        module.print(f"Stage sft -> egspo after phase {trainer.current_epoch + 1}: {reason}.")

    def _restart(self, module: EGSPOModule) -> None:
        if self.reset_optimizer:
            module.restart_optimizer(self.learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """What the decision rests on."""
        return {
            "num_epochs": self.num_epochs,
            "num_bad_epochs": self.num_bad_epochs,
            "best": self.best,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.num_epochs, self.num_bad_epochs = state_dict["num_epochs"], state_dict["num_bad_epochs"]
        self.best = state_dict["best"]


def _benchmark(trainer: Trainer) -> MathBenchmark | None:
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    return next((callback for callback in callbacks if isinstance(callback, MathBenchmark)), None)
