"""MathBenchmark: measures the policy on the datamodule's benchmarks, and keeps the results of each stage."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from egspo_lightning.callbacks.answer_journal import Measurement
from egspo_lightning.callbacks.run_callback import CheckpointedCallback
from egspo_lightning.callbacks.trainer_access import data_of, module_of, resumes_in, step_of_phase
from egspo_lightning.evaluation.report import Report, headline
from egspo_lightning.training.trainer import log_folder
from egspo_lightning.types import NonNegativeInt, Stage

Results = dict[str, dict[str, float]]
"""Benchmark name to metric name to value."""
FIT_FILE = "benchmarks.jsonl"
SAME_AS_AVG = ("pass@1", "maj@1")


class MathBenchmark(CheckpointedCallback):
    """Measures all benchmarks before training, at the stage transition, every n epochs and at the end of training.

    Validate and test measure them too. The ranks share the problems, and the scores cover all ranks. Values are logged
    as ``eval/<benchmark>/<metric>``; other callbacks can monitor them. In fit each evaluation appends a line to
    ``benchmarks.jsonl`` in the log folder.

    Validate and test write ``<folder>/<benchmark>-<fingerprint>/``: ``completions.jsonl`` (every answer with its
    verdict), ``metrics.json`` and ``settings.json``. The fingerprint covers weights, problems, sampling and seed: the
    same command continues an interrupted evaluation, and any other command gets its own folder.

    Args:
        every_n_epochs: Also measure after every n epochs; 0 measures at start, transition and end only.
        at_start: Whether to measure before training.
        enabled: Whether to measure during fit at all.
        save_completions: Whether fit also writes such folders, to ``evaluation/`` in the log folder.
        folder: Output folder of validate and test, "evaluation" in the trainer's default_root_dir by default. In a
            folder given here the names have no fingerprint, and answers of another evaluation are refused.
    """

    checkpointed = ("milestones", "latest", "latest_step", "stage")
    of_run = ("reports", "written")

    def __init__(
        self,
        every_n_epochs: NonNegativeInt = 0,
        at_start: bool = True,
        enabled: bool = True,
        save_completions: bool = False,
        folder: str | None = None,
    ) -> None:
        self.every_n_epochs, self.at_start, self.enabled = every_n_epochs, at_start, enabled
        self.save_completions, self.folder = save_completions, folder
        self.milestones: dict[str, Results] = {}
        """Results by milestone: "before", "after SFT", and "after" with the name of the method."""
        self.latest: Results = {}
        self.latest_step = -1
        """Optimizer steps taken at the latest evaluation."""
        self.reports: list[Report] = []
        """The latest results, with those of subjects and levels."""
        self.written: list[Path] = []
        """The folders that the latest evaluation has written."""
        self.stage: str | None = None
        """Stage of the latest phase."""
        self._running: list[Measurement] = []
        self._returned: list[Any] = []

    # During fit

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy before its first optimizer step, unless a resumed run has that result already."""
        self._drop_later_rows(trainer)
        self._drop_other_benchmarks({b.name for b in data_of(trainer).benchmarks} if self.enabled else set())
        if self.stage is None:
            self.stage = str(module_of(pl_module).stage)
            if self.at_start:
                self._reach("before", trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy at the stage transition."""
        if self.stage == Stage.SFT and module_of(pl_module).stage == Stage.EGSPO:
            self._reach("after SFT", trainer, pl_module)
        self.stage = str(module_of(pl_module).stage)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure every n epochs."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final policy."""
        method = module_of(pl_module).method if self.stage == Stage.EGSPO else "sft"
        self._reach(f"after {method.upper()}", trainer, pl_module)

    def _drop_later_rows(self, trainer: Trainer) -> None:
        """Remove the rows of optimizer steps that a resumed run takes again."""
        path = log_folder(trainer) / FIT_FILE
        if trainer.is_global_zero and path.is_file() and resumes_in(trainer, path.parent):
            rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= trainer.global_step]
            path.write_text("".join(kept), encoding="utf-8")

    def _drop_other_benchmarks(self, names: set[str]) -> None:
        """Remove a checkpoint's results of benchmarks that this run does not have."""
        if set(self.latest) != names:
            self.latest, self.latest_step = {}, -1
        kept = {m: {n: values for n, values in part.items() if n in names} for m, part in self.milestones.items()}
        self.milestones = {milestone: part for milestone, part in kept.items() if part}

    def _reach(self, milestone: str, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled or not data_of(trainer).benchmarks:
            return
        self.measure(trainer, pl_module)
        self.milestones[milestone] = self.latest
        metrics = {name: headline(values) for name, values in self.latest.items()}
        shown = ", ".join(f"{name} {metric} {self.latest[name][metric]:.3f}" for name, metric in metrics.items())
        pl_module.print(f"Benchmarks {milestone}: {shown}")

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy on all benchmarks, at most once for each number of optimizer steps. Collective."""
        if not self.enabled or self.latest_step == trainer.global_step:
            return
        data, place = data_of(trainer), log_folder(trainer)
        measurements = []
        for benchmark in data.benchmarks:
            folder = place / "evaluation" / f"{benchmark.name}-step-{trainer.global_step}-{{fingerprint}}"
            kept_in = folder if self.save_completions else None
            measurements.append(Measurement(benchmark, module_of(pl_module), data, kept_in))
            for batch in data.problems_of(benchmark.name):
                measurements[-1].add(data.answer(batch))
        self._finish(measurements, trainer)
        self.latest_step = trainer.global_step
        if trainer.is_global_zero and measurements:
            self._append_row(place / FIT_FILE, trainer)

    def _append_row(self, path: Path, trainer: Trainer) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        reports = [found._asdict() for found in self.reports]
        row = {"step": trainer.global_step, "epoch": trainer.current_epoch, "benchmarks": reports}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _finish(self, measurements: Sequence[Measurement], trainer: Trainer) -> None:
        """Reduce over ranks and log. Collective."""
        self.reports = [measurement.finish() for measurement in measurements]
        self.written = [measurement.journal.folder for measurement in measurements if measurement.journal is not None]
        self.latest = {found.benchmark: found.metrics for found in self.reports}
        values = self._logged()
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step_of_phase(trainer))
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    def _logged(self) -> dict[str, float]:
        """The latest results by name; of a single sample pass@1 and maj@1 are left out, because they equal avg@1."""
        return {
            f"eval/{found.benchmark}/{metric}": value
            for found in self.reports
            for metric, value in found.metrics.items()
            if found.num_samples > 1 or metric not in SAME_AS_AVG
        }

    # During validate and test

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the answers of an interrupted evaluation."""
        place = Path(self.folder or Path(trainer.default_root_dir) / "evaluation")
        suffix = "" if self.folder else "-{fingerprint}"
        data, module = data_of(trainer), module_of(pl_module)
        self._running = [Measurement(b, module, data, place / f"{b.name}{suffix}") for b in data.benchmarks]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch of answers."""
        self._running[dataloader_idx].add(outputs["completions"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reduce over ranks, log and write."""
        self._finish(self._running, trainer)
        self._running = []
        self._returned = trainer._evaluation_loop._logged_outputs

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the metrics to what ``trainer.validate`` or ``test`` returns, once Lightning has logged its own."""
        for outputs in self._returned:
            outputs.update(self._logged())

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end
