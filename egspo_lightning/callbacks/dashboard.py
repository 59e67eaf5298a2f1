"""Dashboard: TensorBoard's chart layout, stage marks and hyperparameters."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from egspo_lightning.analysis.record_schema import STAGE_MARK
from egspo_lightning.callbacks.logger_displays import log_text, tensorboard_of
from egspo_lightning.callbacks.trainer_access import data_of, module_of
from egspo_lightning.types import Stage

CHARTS = {
    "reward": ("rollout/reward_mean", "rollout/reward_std"),
    "accuracy": ("rollout/accuracy",),
    "entropy (nats)": ("policy/entropy", "policy/entropy_high", "policy/entropy_low", "gate/threshold"),
    "gate": ("gate/high_fraction", "gate/weight_mean"),
    "loss": ("loss/sft", "loss/egspo"),
}
"""The metrics of each chart, in TensorBoard's order."""
BENCHMARKS = r"eval/[^/]+/avg@\d+$"
"""Pattern of the benchmarks' accuracies, drawn beside the accuracy of the rollouts."""
JUDGED = ("rollout/reward_mean", "rollout/accuracy", "policy/entropy")
"""Metrics of the HParams tab, besides the benchmarks' accuracies."""


class Dashboard(Callback):
    """Writes TensorBoard's chart layout, stage marks and HParams tab; other loggers get the hyperparameters.

    The layout is the Custom Scalars tab (http://localhost:6006/#custom_scalars): reward, accuracy, entropy, gate, loss.
    At the stage transition each chart gets a vertical line, ``stage_mark/<chart>``, from its first values towards 0.
    The Text tab gets an entry ``stage`` with the step and the reason.

    Args:
        enabled: Whether to write any of this.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled
        self.hyperparameters: Mapping[str, str | float] = {}
        """Config key to value; the command line sets them."""
        self._stage: Stage | None = None
        self._begun: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write layout and hyperparameters, which stay the same during a run."""
        if stage != TrainerFn.FITTING or not self.enabled:
            return
        self._stage, self._begun = None, None
        parameters = dict(self.hyperparameters)
        for logger in trainer.loggers if trainer.is_global_zero and parameters else []:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(parameters, metrics={})  # otherwise it logs a metric of its own
            else:
                logger.log_hyperparams(parameters)
        names = [f"eval/{benchmark.name}/avg@{benchmark.num_samples}" for benchmark in data_of(trainer).benchmarks]
        judged = dict.fromkeys([*JUDGED, *names], 0.0)  # by name: the tab takes their latest values
        for logger in tensorboard_of(trainer):
            writer = logger.experiment
            writer.add_custom_scalars({"egspo": {title: ["Multiline", _tags(title)] for title in CHARTS}})
            for part in hparams(parameters, judged)[:2] if parameters else []:
                writer.file_writer.add_summary(part)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the first stage of the run."""
        if self._stage is None:
            self._enter(module_of(pl_module).stage, trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the beginning of a stage."""
        if module_of(pl_module).stage != self._stage:
            self._begun = trainer.global_step
            self._enter(module_of(pl_module).stage, trainer)

    def _enter(self, stage: Stage, trainer: Trainer) -> None:
        if self.enabled:
            where = f"phase {trainer.current_epoch + 1}, step {trainer.global_step}"
            why = "" if self._stage is None else _reason_sft_ended(trainer)
            log_text(trainer, "stage", f"Stage **{stage}** from {where}{why}.")
        self._stage = stage

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the stage mark once the stage's first values are known: they give its height."""
        if self._begun is None or not self.enabled:
            return
        for logger in tensorboard_of(trainer):
            for title, names in CHARTS.items():
                points = ((self._begun, _middle(trainer.callback_metrics, names)), (self._begun + 1, 0.0))
                for step, height in points:  # TensorBoard keeps one value a step
                    logger.experiment.add_scalar(_mark(title), height, step)
        self._begun = None

    def state_dict(self) -> dict[str, Any]:
        """The current stage, and the optimizer step of a mark that is not drawn yet."""
        return {"stage": None if self._stage is None else str(self._stage), "begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there: draw the mark that the interrupted run did not draw."""
        stage, self._begun = state_dict["stage"], state_dict["begun"]
        self._stage = None if stage is None else Stage(stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the run as finished in the HParams tab; an interrupted run stays open there."""
        for logger in tensorboard_of(trainer) if self.enabled else []:
            logger.experiment.file_writer.add_summary(hparams({}, {})[2])


def _reason_sft_ended(trainer: Trainer) -> str:
    """The reason that StageTransition gives, if there is one."""
    reasons = (getattr(callback, "sft_end_reason", None) for callback in getattr(trainer, "callbacks", []))
    return "".join(f": {reason}" for reason in reasons if reason)


def _middle(values: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """Mean of a chart's values: TensorBoard never drops a point among them as an outlier."""
    found = [float(values[name]) for name in names if name in values and values[name].isfinite()]
    return sum(found) / len(found) if found else 1.0


def _mark(title: str) -> str:
    return f"{STAGE_MARK}/{title.split()[0]}"


def _tags(title: str) -> list[str]:
    """Patterns of a chart's tags; TensorBoard matches them at the beginning of a tag."""
    names = [f"{re.escape(name)}$" for name in (*CHARTS[title], _mark(title))]
    return [*names, BENCHMARKS] if title == "accuracy" else names


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | float]:
    """Flatten a config to values by key: ``model.gate: QuantileGate``, ``model.gate.top_fraction: 0.2``.

    A class becomes its name, with its arguments below it; nulls are left out.
    """
    values: dict[str, str | float] = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping):
            if "class_path" in value:
                values[name] = str(value["class_path"]).rpartition(".")[2]
                value = value.get("init_args") or {}
            values |= flat(value, name)
        elif isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
            values |= flat({str(i): part for i, part in enumerate(value)}, name)
        elif value is not None:
            values[name] = value if isinstance(value, str | bool | int | float) else str(value)
    return values
