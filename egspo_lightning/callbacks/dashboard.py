"""Dashboard: TensorBoard's chart layout, stage marks and hyperparameters."""

import re
from collections.abc import Mapping, Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from egspo_lightning.analysis.record_schema import STAGE_MARK
from egspo_lightning.callbacks.logger_displays import log_text, tensorboard_of
from egspo_lightning.callbacks.run_callback import CheckpointedCallback
from egspo_lightning.callbacks.trainer_access import data_of, module_of

CHARTS = {
    "reward": ("rollout/reward_mean", "rollout/reward_std"),
    "accuracy": ("rollout/accuracy",),
    "entropy (nats)": ("policy/entropy", "policy/entropy_high", "policy/entropy_low"),
    "gate": ("gate/threshold", "gate/high_fraction", "gate/weight_mean"),
    "loss": ("loss/sft", "loss/egspo"),
}
"""The metrics of each chart, in TensorBoard's order."""
BENCHMARKS = r"eval/[^/]+/avg@\d+$"
"""Pattern of the benchmarks' accuracies, drawn beside the accuracy of the rollouts."""
HPARAMS = (
    "model.method",
    "seed_everything",
    "stage_transition.learning_rate",
    "model.optimizer.lr",
    "model.gate",
    "model.gate.top_fraction",
    "model.attenuation",
    "model.objective.mu",
    "model.objective.beta",
    "data.num_generations",
)
"""Hyperparameters of the HParams tab, in its order; ``config.yaml`` has all of them."""
JUDGED = ("rollout/reward_mean", "policy/entropy")
"""Metrics of the HParams tab, after the accuracies of the first ``NUM_BENCHMARKS`` benchmarks."""
NUM_BENCHMARKS = 2


class Dashboard(CheckpointedCallback):
    """Writes TensorBoard's chart layout, stage marks and HParams tab; other loggers get the hyperparameters.

    The layout is the Custom Scalars tab (http://localhost:6006/#custom_scalars): reward, accuracy, entropy, gate, loss.
    The HParams tab has the hyperparameters that most runs differ in; the other loggers get all of them.
    At the stage transition each chart gets a vertical line, ``stage_mark/<chart>``, from its first values towards 0.
    The Text tab gets an entry ``stage`` with the step and the reason.

    Args:
        enabled: Whether to write any of this.
    """

    checkpointed = ("stage", "begun")

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.hyperparameters: Mapping[str, str | float] = {}
        """Config key to value; the command line sets them."""
        self.stage: str | None = None
        """Stage that was logged last."""
        self.begun: int | None = None
        """Optimizer step of a stage mark that is not drawn yet."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write layout and hyperparameters, which stay the same during a run."""
        super().setup(trainer, pl_module, stage)
        if stage != TrainerFn.FITTING or not self.enabled:
            return
        parameters = dict(self.hyperparameters)
        for logger in trainer.loggers if trainer.is_global_zero and parameters else []:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(parameters, metrics={})  # otherwise it logs a metric of its own
            else:
                logger.log_hyperparams(parameters)
        names = [f"eval/{benchmark.name}/avg@{benchmark.num_samples}" for benchmark in data_of(trainer).benchmarks]
        judged = dict.fromkeys([*names[:NUM_BENCHMARKS], *JUDGED], 0.0)  # by name: the tab takes their latest values
        columns = {name: parameters[name] for name in HPARAMS if name in parameters}
        for logger in tensorboard_of(trainer):
            writer = logger.experiment
            writer.add_custom_scalars({"egspo": {title: ["Multiline", _tags(title)] for title in CHARTS}})
            for part in hparams(columns, judged)[:2] if parameters else []:
                writer.file_writer.add_summary(part)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the beginning of a stage."""
        stage = str(module_of(pl_module).stage)
        if stage == self.stage:
            return
        why = ""
        if self.stage is not None:
            self.begun, why = trainer.global_step, _reason_sft_ended(trainer)
        if self.enabled:
            where = f"phase {trainer.current_epoch + 1}, step {trainer.global_step}"
            label = module_of(pl_module).stage_label
            log_text(trainer, "stage", f"Stage **{label}** from {where}{why}.", trainer.global_step)
        self.stage = stage

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the stage mark once the stage's first values are known: they give its height."""
        if self.begun is None or not self.enabled:
            return
        for logger in tensorboard_of(trainer):
            for title, names in CHARTS.items():
                for i, height in enumerate((_middle(trainer.callback_metrics, names), 0.0)):
                    logger.experiment.add_scalar(_mark(title), height, self.begun + i)  # TensorBoard keeps one a step
        self.begun = None

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
