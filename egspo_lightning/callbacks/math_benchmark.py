"""Measures the policy on the datamodule's benchmarks, and remembers the results stage by stage."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from egspo_lightning.callbacks.access import data_of, module_of
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.benchmarks import Benchmark
from egspo_lightning.evaluation.metrics import BenchmarkMetric
from egspo_lightning.types import Stage

Results = dict[str, dict[str, float]]
"""Benchmark name to metric name to value."""


class MathBenchmark(Callback):
    """Evaluates at the start of training, at the stage transition, every n epochs and at the end.

    The problems are shared among the ranks, and the counts summed over them. Values are logged as
    ``eval/<benchmark>/<metric>``, and can be monitored by other callbacks.

    Args:
        every_n_epochs: Also evaluate after every n epochs; 0 leaves it to start, transition and end.
        at_start: Whether to evaluate before training.
        enabled: Whether to evaluate during fit at all.
    """

    def __init__(self, every_n_epochs: int = 0, at_start: bool = True, enabled: bool = True) -> None:
        super().__init__()
        if every_n_epochs < 0:
            raise UserError(f"math_benchmark.every_n_epochs must be at least 0, got {every_n_epochs}.")
        self.every_n_epochs, self.at_start, self.enabled = every_n_epochs, at_start, enabled
        self.milestones: dict[str, Results] = {}
        """"before", "after SFT" and "after EGSPO" to the results of then."""
        self.latest: Results = {}
        self.latest_step = -1
        """Optimiser steps taken when it was measured."""
        self._stage: str | None = None
        self._running: dict[int, BenchmarkMetric] = {}

    # During fit

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy before its first update; a resumed run has been measured."""
        self._forget_others({benchmark.name for benchmark in data_of(trainer).benchmarks} if self.enabled else set())
        if self._stage is None:
            self._stage = str(module_of(pl_module).stage)
            if self.at_start:
                self._reach("before", trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy where the stage has just changed."""
        if self._stage == Stage.SFT and module_of(pl_module).stage == Stage.EGSPO:
            self._reach("after SFT", trainer, pl_module)
        self._stage = str(module_of(pl_module).stage)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure every n epochs."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final policy."""
        self._reach("after EGSPO" if self._stage == Stage.EGSPO else "after SFT", trainer, pl_module)

    def _forget_others(self, names: set[str]) -> None:
        """Drop what a checkpoint brought along of benchmarks that this run does not have."""
        if set(self.latest) != names:
            self.latest, self.latest_step = {}, -1
        kept = {m: {n: values for n, values in part.items() if n in names} for m, part in self.milestones.items()}
        self.milestones = {milestone: part for milestone, part in kept.items() if part}

    def _reach(self, milestone: str, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled or not data_of(trainer).benchmarks:
            return
        self._evaluate(trainer, pl_module)
        self.milestones[milestone] = self.latest
        shown = ", ".join(
            f"{name} {metric} {values[metric]:.3f}"
            for name, values in self.latest.items()
            for metric in [_headline(values)]
        )
        pl_module.print(f"Benchmarks {milestone}: {shown}")

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy as it is now, once for each of its versions."""
        if not self.enabled or self.latest_step == trainer.global_step:
            return
        data = data_of(trainer)
        results: Results = {}
        for benchmark in data.benchmarks:
            metric = _metric(benchmark, pl_module)
            for batch in data.benchmark_batches(benchmark):
                metric.update(data.answer(batch))
            results[benchmark.name] = metric.compute()
        self.latest, self.latest_step = results, trainer.global_step
        self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        values = {f"eval/{name}/{metric}": v for name, part in self.latest.items() for metric, v in part.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    # During validate and test

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch of completions."""
        if dataloader_idx not in self._running:
            self._running[dataloader_idx] = _metric(data_of(trainer).benchmarks[dataloader_idx], pl_module)
        self._running[dataloader_idx].update(outputs["completions"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reduce over ranks and log."""
        benchmarks = data_of(trainer).benchmarks
        self.latest = {benchmarks[i].name: metric.compute() for i, metric in self._running.items()}
        self._running = {}
        self._log(trainer)

    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    # Results

    def summary(self) -> Table:
        """Benchmark, problems, and the headline metric at each milestone that was reached."""
        table = Table(title="Benchmarks")
        for column in ("benchmark", "problems", "metric", *self.milestones):
            table.add_column(column, justify="left" if column in ("benchmark", "metric") else "right")
        for name, values in self.latest.items():
            metric = _headline(values)
            scores = [_shown(results.get(name, {}).get(metric)) for results in self.milestones.values()]
            table.add_row(name, f"{values['num_problems']:.0f}", metric, *scores)
        return table

    def details(self) -> Table:
        """Every metric of the latest evaluation."""
        table = Table(title="Benchmarks")
        for column in ("benchmark", "metric", "value"):
            table.add_column(column, justify="right" if column == "value" else "left")
        for name, values in self.latest.items():
            for metric, value in values.items():
                table.add_row(name, metric, f"{value:.4g}")
        return table

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What has been measured."""
        return {
            "milestones": self.milestones,
            "latest": self.latest,
            "latest_step": self.latest_step,
            "stage": self._stage,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.milestones, self.latest = state_dict["milestones"], state_dict["latest"]
        self.latest_step, self._stage = state_dict["latest_step"], state_dict["stage"]


def _metric(benchmark: Benchmark, pl_module: LightningModule) -> BenchmarkMetric:
    return BenchmarkMetric(benchmark.num_samples).to(pl_module.device)


def _headline(values: dict[str, float]) -> str:
    """The metric that tables show: avg@n."""
    return next(name for name in values if name.startswith("avg@"))


def _shown(score: float | None) -> str:
    """A score, or a dash where a resumed run has added the benchmark since."""
    return "-" if score is None else f"{score:.3f}"
