"""Summary printed at the end of a run: scores, and the paths of logs, model and answers."""

import sys
from typing import TypeVar

from lightning.pytorch import Callback, Trainer
from rich.console import Console

from egspo_lightning.callbacks import HFExport, MathBenchmark, PredictionWriter
from egspo_lightning.callbacks.logger_displays import tensorboard_of
from egspo_lightning.evaluation.report import milestones_table, score_tables

CallbackT = TypeVar("CallbackT", bound=Callback)

CHARTS_ADDRESS = "http://localhost:6006/#custom_scalars"


def callback_of(trainer: Trainer, kind: type[CallbackT]) -> CallbackT:
    """The trainer's callback of this class."""
    return next(c for c in getattr(trainer, "callbacks", []) if isinstance(c, kind))


def print_fit_summary(trainer: Trainer) -> None:
    """Print the table of scores and the paths of logs and model. Collective: every rank calls it, one prints."""
    log_dir = trainer.log_dir  # broadcast, so every rank asks for it
    if not trainer.is_global_zero:
        return
    benchmark, export = callback_of(trainer, MathBenchmark), callback_of(trainer, HFExport)
    if benchmark.milestones:
        _wide_console().print(milestones_table(benchmark.latest, benchmark.milestones))
    _print_line(f"Logs:  {log_dir}")
    if tensorboard_of(trainer):
        _print_line(f"See:   tensorboard --logdir {trainer.default_root_dir}, then {CHARTS_ADDRESS}")
    if export.exported is not None:
        _print_line(f"Model: {export.exported}")


def print_scores(trainer: Trainer) -> None:
    """Print the scores of validate or test, and the folders of the answers."""
    if not trainer.is_global_zero:
        return
    benchmark = callback_of(trainer, MathBenchmark)
    _wide_console().print(*score_tables(benchmark.reports))
    for folder in benchmark.written:
        _print_line(f"Written: {folder}")


def print_answers_path(trainer: Trainer) -> None:
    """Print the path of the answers of predict."""
    if trainer.is_global_zero:
        _print_line(f"Answers: {callback_of(trainer, PredictionWriter).path}")


def _print_line(text: str) -> None:
    _wide_console().print(text, soft_wrap=True, highlight=False)


def _wide_console() -> Console:
    """A console for tables; no column is cut where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 160)
