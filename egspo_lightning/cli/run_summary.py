"""Summary printed at the end of a run: scores, and the paths of logs, model and answers."""

import json
import sys
from itertools import islice
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from egspo_lightning.analysis.token_text import visible
from egspo_lightning.callbacks.hf_export import HFExport
from egspo_lightning.callbacks.logger_displays import tensorboard_of
from egspo_lightning.callbacks.math_benchmark import MathBenchmark
from egspo_lightning.callbacks.prediction_writer import PredictionWriter
from egspo_lightning.callbacks.trainer_access import callbacks_of
from egspo_lightning.evaluation.report import milestones_table, score_tables
from egspo_lightning.training.trainer import log_folder

NUM_SHOWN = 3
"""Answers of predict that are printed."""
ELLIPSIS = " ... "
VERDICTS = {True: "right", False: "wrong", None: "no gold answer"}
CHARTS_ADDRESS = "http://localhost:6006/#custom_scalars"


def print_fit_summary(trainer: Trainer) -> None:
    """Print the table of scores and the paths of logs and model. Collective: every rank calls it, one prints."""
    folder = log_folder(trainer)
    if not trainer.is_global_zero:
        return
    for benchmark in callbacks_of(trainer, MathBenchmark):
        if benchmark.milestones:
            _wide_console().print(milestones_table(benchmark.latest, benchmark.milestones))
    _print_line(f"Logs:  {readable_path(folder)}")
    if trainer.loggers:
        _print_line(f"See:   egspo report {folder} -o report.html")
    if tensorboard_of(trainer):
        _print_line(f"Or:    tensorboard --logdir {trainer.default_root_dir}, then {CHARTS_ADDRESS}")
    for export in callbacks_of(trainer, HFExport):
        if export.exported is not None:
            _print_line(f"Model: {readable_path(export.exported)}")


@rank_zero_only
def print_scores(trainer: Trainer) -> None:
    """Print the scores of validate or test, and the folders of the answers."""
    for benchmark in callbacks_of(trainer, MathBenchmark):
        _wide_console().print(*score_tables(benchmark.reports))
        for folder in benchmark.written:
            _print_line(f"Written: {readable_path(folder)}")


@rank_zero_only
def print_answers(trainer: Trainer) -> None:
    """Print the first answers of predict, and the path of all."""
    for writer in callbacks_of(trainer, PredictionWriter):
        with writer.path.open(encoding="utf-8") as file:
            for row in map(json.loads, islice(file, NUM_SHOWN)):
                verdict = f"  ({VERDICTS[row['correct']]})"
                _print_line(_shortened(row["problem"], _wide_console().width))
                _print_line("  " + _shortened(row["completion"], _wide_console().width - 2 - len(verdict)) + verdict)
        _print_line(f"Answers: {readable_path(writer.path)}")


def readable_path(path: Path) -> Path:
    """The path from the working folder, if the file is in it."""
    absolute, here = path.absolute(), Path.cwd()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else path


def _shortened(text: str, width: int) -> str:
    """A text on one line with visible control characters, cut in the middle: its answer stands at the end."""
    line = visible(" ".join(text.split()))
    kept = max(width - len(ELLIPSIS), 2) // 2
    return line if len(line) <= width else line[:kept] + ELLIPSIS + line[-kept:]


def _print_line(text: str) -> None:
    _wide_console().print(text, soft_wrap=True, highlight=False, markup=False)


def _wide_console() -> Console:
    """A console for tables; no column is cut where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 160)
