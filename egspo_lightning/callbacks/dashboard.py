"""What TensorBoard opens on: a few charts with the stages marked in them, and the run's hyperparameters."""

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
from egspo_lightning.callbacks.stage_transition import StageTransition
from egspo_lightning.callbacks.trainer_access import data_of, module_of
from egspo_lightning.types import Stage

CHARTS = {
    "reward": ("rollout/reward_mean", "rollout/reward_std"),
    "accuracy": ("rollout/accuracy",),
    "entropy (nats)": ("policy/entropy", "policy/entropy_high", "policy/entropy_low", "gate/threshold"),
    "gate": ("gate/high_fraction", "gate/weight_mean"),
    "loss": ("loss/sft", "loss/egspo"),
}
"""Chart to the metrics in it, in the order in which they stand in TensorBoard."""
BENCHMARKS = r"eval/[^/]+/avg@\d+$"
"""The benchmarks' accuracies, which stand beside the rollouts'."""
JUDGED = ("rollout/reward_mean", "rollout/accuracy", "policy/entropy")
"""The metrics of the HParams tab, besides the benchmarks' accuracies."""


class Dashboard(Callback):
    """Gives TensorBoard a layout, marks of the stages and the HParams tab; other loggers get the hyperparameters.

    The layout is the Custom Scalars tab (http://localhost:6006/#custom_scalars): reward, accuracy, entropy, gate, loss.
    Where stage EGSPO begins, each has an upright line, ``stage_mark/<chart>``, from its first values towards 0,
    and the Text tab has an entry ``stage`` with the step and the reason.

    Args:
        enabled: Whether to write any of it.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled
        self.hyperparameters: Mapping[str, str | float] = {}
        """Those of the run, by their place in its config; the command line sets them."""
        self._stage: Stage | None = None
        self._begun: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write what does not change: layout and hyperparameters."""
        if stage != TrainerFn.FITTING or not self.enabled:
            return
        self._stage, self._begun = None, None
        parameters = dict(self.hyperparameters)
        for logger in trainer.loggers if trainer.is_global_zero and parameters else []:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(parameters, metrics={})  # without, it logs a metric of its own
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
        """Say with which stage the run begins."""
        if self._stage is None:
            self._enter(module_of(pl_module).stage, trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say when a stage begins."""
        if module_of(pl_module).stage != self._stage:
            self._begun = trainer.global_step
            self._enter(module_of(pl_module).stage, trainer)

    def _enter(self, stage: Stage, trainer: Trainer) -> None:
        if self.enabled:
            where = f"phase {trainer.current_epoch + 1}, step {trainer.global_step}"
            why = "" if self._stage is None else _reason(trainer)
            log_text(trainer, "stage", f"Stage **{stage}** from {where}{why}.")
        self._stage = stage

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the beginning of the stage once its first values are known: they say where the chart is."""
        if self._begun is None or not self.enabled:
            return
        for logger in tensorboard_of(trainer):
            for title, names in CHARTS.items():
                points = ((self._begun, _middle(trainer.callback_metrics, names)), (self._begun + 1, 0.0))
                for step, height in points:  # two of one step would be one to TensorBoard
                    logger.experiment.add_scalar(_mark(title), height, step)
        self._begun = None

    def state_dict(self) -> dict[str, Any]:
        """The stage that was entered, and where, as long as it is not marked."""
        return {"stage": None if self._stage is None else str(self._stage), "begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Mark what the run that goes on here had yet to mark."""
        stage, self._begun = state_dict["stage"], state_dict["begun"]
        self._stage = None if stage is None else Stage(stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the HParams tab that the run is finished; one that is ended stays open there."""
        for logger in tensorboard_of(trainer) if self.enabled else []:
            logger.experiment.file_writer.add_summary(hparams({}, {})[2])


def _reason(trainer: Trainer) -> str:
    """Why SFT has ended."""
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    return "".join(f": {c.reason}" for c in callbacks if isinstance(c, StageTransition) and c.reason)


def _middle(values: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """The mean of the chart's values: a point amid them is drawn whatever TensorBoard takes for outliers."""
    found = [float(values[name]) for name in names if name in values and values[name].isfinite()]
    return sum(found) / len(found) if found else 1.0


def _mark(title: str) -> str:
    return f"{STAGE_MARK}/{title.split()[0]}"


def _tags(title: str) -> list[str]:
    """Patterns of a chart's tags; TensorBoard takes whatever begins as a pattern says."""
    names = [f"{re.escape(name)}$" for name in (*CHARTS[title], _mark(title))]
    return [*names, BENCHMARKS] if title == "accuracy" else names


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | float]:
    """A config as single values by their place in it, as in ``model.gate: QuantileGate, model.gate.top_fraction: 0.2``.

    A class stands by its name alone, its arguments under it; what is null is left out.
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
