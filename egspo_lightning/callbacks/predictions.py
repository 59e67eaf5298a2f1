"""Writes what ``predict`` answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Appends each answered problem to ``predictions-rank-R.jsonl``: id, problem, answer, completion, verdict.

    Args:
        folder: Where to; the trainer's default_root_dir by default.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder

    def path(self, trainer: Trainer) -> Path:
        """The file of this rank."""
        return Path(self.folder or trainer.default_root_dir) / f"predictions-rank-{trainer.global_rank}.jsonl"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an empty file."""
        path = self.path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch."""
        with self.path(trainer).open("a", encoding="utf-8") as file:
            for completion in prediction:
                row = {
                    "id": completion.problem.id,
                    "problem": completion.problem.problem,
                    "answer": completion.problem.answer,
                    "completion": completion.text,
                    "extracted": completion.extracted,
                    "correct": completion.correct,
                    "is_truncated": completion.is_truncated,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
