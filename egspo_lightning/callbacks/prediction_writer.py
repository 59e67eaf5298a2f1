"""PredictionWriter: writes the answers of ``predict`` to disk."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from egspo_lightning.callbacks.answer_journal import close_journal, open_journal
from egspo_lightning.callbacks.trainer_access import data_of, module_of
from egspo_lightning.data.sources import ProblemSource
from egspo_lightning.evaluation.answerer import PREDICT
from egspo_lightning.evaluation.journal import Journal


class PredictionWriter(Callback):
    """Writes each answer with its verdict to ``<folder>/completions.jsonl``, in the order of the problems.

    The verdict is null where a problem has no gold answer. The fingerprint covers weights, problems, sampling and
    seed: the same command continues an interrupted run, and another command never overwrites its answers.

    Args:
        folder: Output folder; by default ``predictions/<problems>-<fingerprint>`` in the trainer's default_root_dir,
            with the name of the file of problems, or of the class of their source.
    """

    _journal: Journal

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    @property
    def path(self) -> Path:
        """The file of answers, once predict has started."""
        return self._journal.completions

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the answers of an interrupted predict."""
        data = data_of(trainer)
        name = f"{_name(data.problems)}-{{fingerprint}}"
        folder = Path(self.folder or Path(trainer.default_root_dir) / "predictions" / name)
        self._journal = open_journal(PREDICT, module_of(pl_module), data, folder)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """Append a batch."""
        self._journal.append(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the answers of all ranks."""
        close_journal(self._journal, module_of(pl_module), data_of(trainer))


def _name(problems: ProblemSource) -> str:
    """A name for a source of problems, which a folder may have."""
    name = Path(str(getattr(problems, "path", type(problems).__name__))).stem
    return re.sub(r"[^\w.-]+", "-", name)
