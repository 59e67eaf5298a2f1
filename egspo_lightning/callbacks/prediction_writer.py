"""Writes what ``predict`` answers."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.callbacks.benchmark_recording import close_journal, open_journal
from egspo_lightning.evaluation.answerer import PREDICT
from egspo_lightning.evaluation.journal import Journal


class PredictionWriter(Callback):
    """Writes each answer with its verdict to ``<folder>/completions.jsonl``, in the order of the problems.

    The verdict is null where a problem has no reference answer. The fingerprint is that of weights, problems, sampling
    and seed, so the same command goes on where it was cut off, and no other writes over its answers.

    Args:
        folder: Where to; ``predictions/<fingerprint>`` in the trainer's default_root_dir by default.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.folder = folder
        self._journal: Journal | None = None

    @property
    def path(self) -> Path:
        """Where the answers are."""
        assert self._journal is not None, "predict has not run"
        return self._journal.completions

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the answers of a predict that was cut off."""
        folder = Path(self.folder or Path(trainer.default_root_dir) / "predictions" / "{fingerprint}")
        self._journal = open_journal(trainer, pl_module, PREDICT, folder)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append a batch."""
        assert self._journal is not None
        self._journal.append(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the ranks' answers together."""
        assert self._journal is not None
        close_journal(trainer, self._journal)
