"""Decides when SFT ends, and carries the policy over into stage EGSPO."""

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.callbacks.access import module_of
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.types import Stage


class StageTransition(Callback):
    """Ends stage SFT after a number of epochs, or when a monitored metric is good enough or stops improving.

    Whichever condition holds first counts. At the transition the SFT policy becomes the reference (where beta > 0),
    the optimiser may start anew, and a checkpoint ``sft.ckpt`` is written from which stage EGSPO can be started.

    Args:
        after_epochs: Epochs of SFT; null leaves it to the monitored metric, and without one SFT never ends.
        monitor: Name of a logged metric, such as loss/sft.
        mode: Whether smaller (min) or larger (max) values are better.
        target: Value of the metric that is good enough.
        patience: Epochs without an improvement after which SFT ends.
        min_delta: Least change that counts as an improvement.
        reset_optimizer: Forget the optimiser's moments and start its schedule anew.
        learning_rate: Learning rate of stage EGSPO; null keeps that of SFT. Needs reset_optimizer.
        save_checkpoint: Whether to write sft.ckpt into the log folder.
    """

    def __init__(
        self,
        after_epochs: int | None = 1,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        target: float | None = None,
        patience: int | None = None,
        min_delta: float = 0.0,
        reset_optimizer: bool = True,
        learning_rate: float | None = None,
        save_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        for field, value in (("after_epochs", after_epochs), ("patience", patience)):
            if value is not None and value < 1:
                raise UserError(f"stage_transition.{field} must be at least 1, or null, got {value}.")
        if monitor is None and (target is not None or patience is not None):
            raise UserError("stage_transition.target and .patience need stage_transition.monitor, the metric's name.")
        if monitor is not None and target is None and patience is None:
            raise UserError("stage_transition.monitor needs stage_transition.target, .patience, or both.")
        if learning_rate is not None and not reset_optimizer:
            raise UserError("stage_transition.learning_rate needs stage_transition.reset_optimizer: true.")
        self.after_epochs, self.monitor, self.mode = after_epochs, monitor, mode
        self.target, self.patience, self.min_delta = target, patience, min_delta
        self.reset_optimizer, self.learning_rate, self.save_checkpoint = (
            reset_optimizer,
            learning_rate,
            save_checkpoint,
        )
        self.num_epochs = self.num_bad_epochs = 0
        self.best: float | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide the stage of the next epoch, since its loader is asked for before it starts."""
        if module_of(pl_module).stage != Stage.SFT:
            return
        self.num_epochs += 1
        reason = self._reason(trainer)
        if trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
            self._enter_egspo(trainer, module_of(pl_module), reason or "another rank decided so")

    def _reason(self, trainer: Trainer) -> str | None:
        """Why SFT should end now, or None."""
        if self.monitor is not None:
            reason = self._judge(self._monitored(trainer))
            if reason is not None:
                return reason
        if self.after_epochs is not None and self.num_epochs >= self.after_epochs:
            return f"{self.num_epochs} epochs done"
        return None

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
        module.stage = Stage.EGSPO
        module.refresh_reference()
        self._restart(module)
        log_dir = trainer.log_dir
        if self.save_checkpoint and log_dir is not None:
            trainer.save_checkpoint(Path(log_dir) / "sft.ckpt")
            self._restart(module)  # to save an empty state, torch fills it by a step of its own where it is sharded
        module.print(f"Stage sft -> egspo after epoch {trainer.current_epoch}: {reason}.")

    def _restart(self, module: EGSPOModule) -> None:
        if self.reset_optimizer:
            module.restart_optimizer(self.learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """What the decision rests on."""
        return {"num_epochs": self.num_epochs, "num_bad_epochs": self.num_bad_epochs, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.num_epochs, self.num_bad_epochs = state_dict["num_epochs"], state_dict["num_bad_epochs"]
        self.best = state_dict["best"]
