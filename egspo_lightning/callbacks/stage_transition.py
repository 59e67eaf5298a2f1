"""StageTransition: decides when SFT ends, and starts stage EGSPO."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from egspo_lightning.callbacks.run_callback import CheckpointedCallback
from egspo_lightning.callbacks.trainer_access import module_of
from egspo_lightning.errors import UserError
from egspo_lightning.module import EGSPOModule
from egspo_lightning.training.callback_rules import require_early_stopping
from egspo_lightning.training.fit_loop import extend_fast_dev_run
from egspo_lightning.training.start_warnings import rate_warning, warn
from egspo_lightning.training.trainer import log_folder
from egspo_lightning.types import PositiveFloat, PositiveInt, Stage


@runtime_checkable
class MeasuresBenchmarks(Protocol):
    """The part of MathBenchmark that StageTransition reads."""

    every_n_epochs: int
    latest_step: int


class StageTransition(CheckpointedCallback):
    """Ends stage SFT after a number of epochs, or when a monitored metric reaches a target or stops improving.

    The first condition that holds ends SFT; without any, SFT is one epoch. ``on_train_epoch_end`` decides for the next
    epoch. At the transition the SFT policy becomes the reference policy (where beta > 0 or kl_reward is set), the
    optimizer may start anew, and the checkpoint ``sft.ckpt`` is written. Stage EGSPO can be started from it.

    Args:
        after_epochs: Maximum number of SFT epochs; null leaves it to the monitored metric.
        monitor: Name of a logged metric, such as loss/sft. Metrics of MathBenchmark (eval/...) exist only if
            math_benchmark.every_n_epochs is above 0, and are judged in the epochs that measure them.
        mode: Whether smaller (min) or larger (max) values are better.
        target: Value of the metric that ends SFT.
        patience: Epochs without an improvement after which SFT ends.
        min_delta: An improvement must be larger than this.
        reset_optimizer: Clear the optimizer's moments and restart its schedule.
        learning_rate: Learning rate of stage EGSPO; null keeps that of the optimizer's config. Needs reset_optimizer.
        save_checkpoint: Whether to write sft.ckpt into the log folder.
        enabled: false trains by SFT only.
    """

    checkpointed = ("num_epochs", "num_bad_epochs", "best")
    of_run = ("sft_end_reason",)

    def __init__(
        self,
        after_epochs: PositiveInt | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        target: float | None = None,
        patience: PositiveInt | None = None,
        min_delta: float = 0.0,
        reset_optimizer: bool = True,
        learning_rate: PositiveFloat | None = None,
        save_checkpoint: bool = True,
        enabled: bool = True,
    ) -> None:
        if monitor is None and (target is not None or patience is not None):
            raise UserError("stage_transition.target and .patience need stage_transition.monitor, the metric's name.")
        if monitor is not None and target is None and patience is None:
            raise UserError("stage_transition.monitor needs stage_transition.target, .patience, or both.")
        if learning_rate is not None and not reset_optimizer:
            raise UserError("stage_transition.learning_rate needs stage_transition.reset_optimizer: true.")
        self.after_epochs = 1 if after_epochs is None and monitor is None else after_epochs
        self.monitor, self.mode, self.target = monitor, mode, target
        self.patience, self.min_delta = patience, min_delta
        self.learning_rate = None if learning_rate is None else float(learning_rate)  # checkpoints hold it
        self.reset_optimizer, self.save_checkpoint, self.enabled = reset_optimizer, save_checkpoint, enabled
        self.num_epochs = self.num_bad_epochs = 0
        self.best: float | None = None
        self.sft_end_reason: str | None = None
        """Why SFT ended; None unless it ended in this run."""
        self._is_dev_run = False  # trainer.fast_dev_run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check settings against each other.

        Raises:
            UserError: enabled is false with model.initial_stage egspo, no benchmark measures the monitored metric, or
                the schedule does not read learning_rate.
        """
        super().setup(trainer, pl_module, stage)
        if stage == TrainerFn.FITTING:
            self._set_up_run(trainer, module_of(pl_module))
        benchmark = _benchmark(trainer)
        is_measured = benchmark is not None and benchmark.every_n_epochs > 0
        if self.monitor is not None and self.monitor.startswith("eval/") and not is_measured:
            raise UserError(
                f"stage_transition.monitor is {self.monitor!r}, but math_benchmark.every_n_epochs is 0, so it is not "
                "measured during SFT. Set it to 1 or more."
            )

    def _set_up_run(self, trainer: Trainer, module: EGSPOModule) -> None:
        self._is_dev_run = bool(getattr(trainer, "fast_dev_run", False))
        if self.enabled:
            module.require_rate_kept("stage_transition.learning_rate", self.learning_rate)
        if self.enabled and self._is_dev_run and module.initial_stage == Stage.SFT:
            extend_fast_dev_run(trainer)
        if not self.enabled and module.initial_stage == Stage.EGSPO:
            raise UserError(
                "stage_transition.enabled: false trains by SFT only, but model.initial_stage: egspo skips SFT. "
                "Change one of them."
            )

    @property
    def _num_sft_epochs(self) -> int | None:
        """Maximum number of SFT epochs."""
        return 1 if self._is_dev_run else self.after_epochs

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """With enabled false, stay in stage SFT, even if the checkpoint is at the transition."""
        if not self.enabled:
            module_of(pl_module).stage = Stage.SFT

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set up reference policy, critic and optimizer from this run's config, if stage EGSPO starts with the run.

        A run starts with stage EGSPO from ``sft.ckpt`` or by ``initial_stage: egspo``. Also warn of a max_epochs that
        ends within SFT.

        Raises:
            UserError: the run starts in stage SFT, and an EarlyStopping needs a metric of stage EGSPO.
        """
        module = module_of(pl_module)
        if module.stage == Stage.SFT:
            require_early_stopping(trainer)
        has_left_sft = module.stage == Stage.EGSPO or module.egspo_start_step > 0
        if has_left_sft and module.egspo_start_step == trainer.global_step:
            self._start_egspo(module)
        elif module.stage == Stage.EGSPO and trainer.ckpt_path is None:  # another fit of this trainer: a new optimizer
            self._restart_optimizer(module)
        self._warn_of_rates(trainer, module)
        last_sft_epoch = trainer.current_epoch + (self._num_sft_epochs or 0) - self.num_epochs
        if self.enabled and module.stage == Stage.SFT and 0 < (trainer.max_epochs or -1) <= last_sft_epoch:
            rank_zero_warn(
                f"trainer.max_epochs = {trainer.max_epochs} ends within stage SFT (stage_transition.after_epochs = "
                f"{self.after_epochs}), so no phase of EGSPO follows. Raise max_epochs, or set "
                "stage_transition.enabled: false to train by SFT only."
            )

    def _warn_of_rates(self, trainer: Trainer, module: EGSPOModule) -> None:
        """Warn of the learning rates of the stages that the run trains."""
        optimizer = trainer.optimizers[0]
        base = float(optimizer.defaults["lr"])
        rates = {Stage.SFT: base} if module.stage == Stage.SFT else {}
        if self.enabled:
            rates[Stage.EGSPO] = self.learning_rate or base
        for stage, rate in rates.items():
            warn(rate_warning(module.policy_config, type(optimizer).__name__, stage, rate))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the transition once a phase of stage EGSPO starts: the run may end with SFT."""
        module = module_of(pl_module)
        if self.sft_end_reason is not None and module.egspo_start_step == trainer.global_step:
            module.print(f"Stage sft -> {module.method} after phase {trainer.current_epoch}: {self.sft_end_reason}.")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide the stage of the next epoch here: Lightning requests its loader before ``on_train_epoch_start``."""
        if not self.enabled or module_of(pl_module).stage != Stage.SFT:
            return
        self.num_epochs += 1
        reason = self._reason_to_end_sft(trainer)
        # this project's metrics are equal on all ranks, but a user's own may differ
        if trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
            self._end_sft(trainer, module_of(pl_module), reason or "decided by another rank")

    def _end_sft(self, trainer: Trainer, module: EGSPOModule, reason: str) -> None:
        """End SFT: the next epoch trains stage EGSPO."""
        module.stage = Stage.EGSPO
        self.sft_end_reason = reason
        self._start_egspo(module)
        if self.save_checkpoint and not self._is_dev_run:
            trainer.save_checkpoint(log_folder(trainer) / "sft.ckpt", weights_only=False)

    def _start_egspo(self, module: EGSPOModule) -> None:
        module.start_egspo_stage()
        self._restart_optimizer(module)

    def _restart_optimizer(self, module: EGSPOModule) -> None:
        if self.reset_optimizer:
            module.restart_optimizer(self.learning_rate)

    def _reason_to_end_sft(self, trainer: Trainer) -> str | None:
        """Why SFT should end now; None where it goes on. The monitored metric is judged first."""
        benchmark, monitor = _benchmark(trainer), self.monitor or ""
        is_stale = monitor.startswith("eval/") and benchmark and benchmark.latest_step != trainer.global_step
        reason = self._judge(monitor, trainer.callback_metrics) if monitor and not is_stale else None
        if reason is None and self._num_sft_epochs is not None and self.num_epochs >= self._num_sft_epochs:
            reason = f"{self.num_epochs} epochs done"
        return reason

    def _judge(self, monitor: str, metrics: Mapping[str, Tensor]) -> str | None:
        if monitor not in metrics:
            raise UserError(
                f"stage_transition.monitor: no metric {monitor!r} was logged. Logged so far: "
                f"{', '.join(sorted(metrics))}."
            )
        value, sign = float(metrics[monitor]), 1 if self.mode == "max" else -1
        if self.target is not None and sign * (value - self.target) >= 0:
            return f"{monitor} = {value:.4g} has reached {self.target:.4g}"
        if self.best is None or sign * (value - self.best) > self.min_delta:
            self.best, self.num_bad_epochs = value, 0
        else:
            self.num_bad_epochs += 1
        if self.patience is not None and self.num_bad_epochs >= self.patience:
            return f"{monitor} has not improved on {self.best:.4g} for {self.num_bad_epochs} epochs"
        return None


def _benchmark(trainer: Trainer) -> MeasuresBenchmarks | None:
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    return next((callback for callback in callbacks if isinstance(callback, MeasuresBenchmarks)), None)
