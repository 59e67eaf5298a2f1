"""One benchmark being measured: its answers counted, kept where they are kept, and told at the end."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from egspo_lightning.callbacks.benchmark_recording import checkpoint_of, close_journal
from egspo_lightning.callbacks.trainer_access import data_of
from egspo_lightning.evaluation.answer_records import Answer
from egspo_lightning.evaluation.benchmarks import Benchmark
from egspo_lightning.evaluation.journal import METRICS, Journal, write_json
from egspo_lightning.evaluation.report import Report, headline, report
from egspo_lightning.evaluation.scores import BenchmarkMetric, interval


class Measurement:
    """Takes the answers to a benchmark, batch by batch, on each rank its own.

    Args:
        benchmark: What is answered.
        journal: Where answers are kept; None to count them only.
        trainer: The running one.
        pl_module: Whose answers they are.
    """

    def __init__(
        self, benchmark: Benchmark, journal: Journal | None, trainer: Trainer, pl_module: LightningModule
    ) -> None:
        self.journal = journal
        self._benchmark, self._trainer, self._module = benchmark, trainer, pl_module
        self._problems = data_of(trainer).answerer.problems(benchmark.name)
        self._metric = BenchmarkMetric(self._problems, benchmark.num_samples).to(pl_module.device)

    def add(self, answers: Sequence[Answer]) -> None:
        """Count answers, those of one problem next to one another."""
        if self.journal is not None:
            self.journal.append(answers)
        self._metric.update(answers)

    def finish(self) -> Report:
        """The scores over all ranks; with a journal, metrics.json is written beside the answers. Collective."""
        num_samples = self._benchmark.num_samples
        table = self._metric.compute().cpu()
        found = report(self._benchmark.name, self._problems, num_samples, table)
        if self.journal is not None:
            close_journal(self._trainer, self.journal)
            if self._trainer.is_global_zero:
                bounds = {f"{headline(found.metrics)}_interval_95": interval(table, num_samples)}
                origin = checkpoint_of(self._trainer, self._module) | {"settings": self.journal.settings}
                write_json(self.journal.folder / METRICS, found._asdict() | bounds | origin)
        return found
