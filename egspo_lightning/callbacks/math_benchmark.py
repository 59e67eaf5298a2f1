"""Measures the policy on the datamodule's benchmarks, and remembers the results stage by stage."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from egspo_lightning.callbacks.benchmark_measurement import Measurement
from egspo_lightning.callbacks.benchmark_recording import open_journal
from egspo_lightning.callbacks.trainer_access import data_of, goes_on_in, module_of
from egspo_lightning.errors import UserError
from egspo_lightning.evaluation.report import Report, headline, milestones_table, score_tables
from egspo_lightning.types import Stage

Results = dict[str, dict[str, float]]
"""Benchmark name to metric name to value."""
FIT_FILE = "benchmarks.jsonl"


class MathBenchmark(Callback):
    """Evaluates at the start of training, at the stage transition, every n epochs and at the end; in validate and test.

    The problems are shared among the ranks, and counted over them. Values are logged as ``eval/<benchmark>/<metric>``,
    and can be monitored by other callbacks. In fit each evaluation is a line of ``benchmarks.jsonl`` in the log folder.

    Validate and test write ``<folder>/<benchmark>-<fingerprint>/``: ``completions.jsonl`` (every answer with its
    verdict), ``metrics.json`` and ``settings.json``. The fingerprint is that of weights, problems, sampling and seed,
    so the same command goes on where it was cut off, and any other has a folder of its own.

    Args:
        every_n_epochs: Also evaluate after every n epochs; 0 leaves it to start, transition and end.
        at_start: Whether to evaluate before training.
        enabled: Whether to evaluate during fit at all.
        save_completions: Whether fit writes such folders as well, to ``evaluation/`` in the log folder.
        folder: Where validate and test write, without fingerprints then; answers of another evaluation that are there
            are refused. "evaluation" in the trainer's default_root_dir by default.
    """

    def __init__(
        self,
        every_n_epochs: int = 0,
        at_start: bool = True,
        enabled: bool = True,
        save_completions: bool = False,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        if every_n_epochs < 0:
            raise UserError(f"math_benchmark.every_n_epochs must be at least 0, got {every_n_epochs}.")
        self.every_n_epochs, self.at_start, self.enabled = every_n_epochs, at_start, enabled
        self.save_completions, self.folder = save_completions, folder
        self.milestones: dict[str, Results] = {}
        """"before", "after SFT" and "after EGSPO" to the results of then."""
        self.latest: Results = {}
        self.latest_step = -1
        """Optimizer steps taken when it was measured."""
        self.reports: list[Report] = []
        """The latest results with those of subjects and levels."""
        self.written: list[Path] = []
        """The folders that validate or test has written."""
        self._stage: str | None = None
        self._running: list[Measurement] = []

    # During fit

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy before its first update; a resumed run has been measured."""
        self._forget_later_scores(trainer)
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

    def _forget_later_scores(self, trainer: Trainer) -> None:
        """Drop the rows of steps that a resumed run takes again."""
        log_dir = trainer.log_dir  # asked for on every rank: it is broadcast
        path = Path(log_dir or trainer.default_root_dir) / FIT_FILE
        if trainer.is_global_zero and path.is_file() and goes_on_in(trainer, path.parent):
            rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= trainer.global_step]
            path.write_text("".join(kept), encoding="utf-8")

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
            for metric in [headline(values)]
        )
        pl_module.print(f"Benchmarks {milestone}: {shown}")

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy as it is now, once for each of its versions."""
        if not self.enabled or self.latest_step == trainer.global_step:
            return
        data, log_dir = data_of(trainer), trainer.log_dir  # asked for on every rank: it is broadcast
        place = Path(log_dir or trainer.default_root_dir)
        measurements = []
        for benchmark in data.benchmarks:
            folder = place / "evaluation" / f"{benchmark.name}-step-{trainer.global_step}-{{fingerprint}}"
            journal = open_journal(trainer, pl_module, benchmark.name, folder) if self.save_completions else None
            measurement = Measurement(benchmark, journal, trainer, pl_module)
            for batch in data.benchmark_batches(benchmark):
                measurement.add(data.answer(batch))
            measurements.append(measurement)
        self._finish(measurements, trainer)
        self.latest_step = trainer.global_step
        if trainer.is_global_zero and measurements:
            self._append_to(place / FIT_FILE, trainer)

    def _append_to(self, path: Path, trainer: Trainer) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "benchmarks": [found._asdict() for found in self.reports],
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _finish(self, measurements: Sequence[Measurement], trainer: Trainer) -> None:
        """Reduce over ranks and log. Collective."""
        self.reports = [measurement.finish() for measurement in measurements]
        self.written = [measurement.journal.folder for measurement in measurements if measurement.journal is not None]
        self.latest = {found.benchmark: found.metrics for found in self.reports}
        self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        values = {f"eval/{name}/{metric}": v for name, part in self.latest.items() for metric, v in part.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    # During validate and test

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the answers of an evaluation that was cut off."""
        place = Path(self.folder or Path(trainer.default_root_dir) / "evaluation")
        self._running = []
        for benchmark in data_of(trainer).benchmarks:
            folder = place / (benchmark.name if self.folder else f"{benchmark.name}-{{fingerprint}}")
            journal = open_journal(trainer, pl_module, benchmark.name, folder)
            self._running.append(Measurement(benchmark, journal, trainer, pl_module))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch of answers."""
        self._running[dataloader_idx].add(outputs["completions"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reduce over ranks, log and write."""
        self._finish(self._running, trainer)
        self._running = []

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    # Results

    def summary(self) -> Table:
        """Benchmark, problems, and the headline metric at each milestone that was reached."""
        return milestones_table(self.latest, self.milestones)

    def details(self) -> list[Table]:
        """The scores of the latest evaluation, whole and by subject and level."""
        return score_tables(self.reports)

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
