"""Summary printed at the end of a run: scores, and the paths of logs, model and answers."""

import json
import sys
from itertools import islice

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from egspo_lightning.callbacks.hf_export import HFExport
from egspo_lightning.callbacks.logger_displays import tensorboard_of
from egspo_lightning.callbacks.math_benchmark import MathBenchmark
from egspo_lightning.callbacks.prediction_writer import PredictionWriter
from egspo_lightning.callbacks.trainer_access import callbacks_of
from egspo_lightning.evaluation.report import milestones_table, score_tables
from egspo_lightning.training.trainer import log_folder

NUM_SHOWN = 3
"""Answers of predict that are printed."""
MOST_SHOWN = 200
"""Characters of a problem or an answer that are printed."""
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
    _print_line(f"Logs:  {folder}")
    if tensorboard_of(trainer):
        _print_line(f"See:   tensorboard --logdir {trainer.default_root_dir}, then {CHARTS_ADDRESS}")
    for export in callbacks_of(trainer, HFExport):
        if export.exported is not None:
            _print_line(f"Model: {export.exported}")


@rank_zero_only
def print_scores(trainer: Trainer) -> None:
    """Print the scores of validate or test, and the folders of the answers."""
    for benchmark in callbacks_of(trainer, MathBenchmark):
        _wide_console().print(*score_tables(benchmark.reports))
        for folder in benchmark.written:
            _print_line(f"Written: {folder}")


@rank_zero_only
def print_answers(trainer: Trainer) -> None:
    """Print the first answers of predict, and the path of all."""
    for writer in callbacks_of(trainer, PredictionWriter):
        with writer.path.open(encoding="utf-8") as file:
            for row in map(json.loads, islice(file, NUM_SHOWN)):
                _print_line(
                    f"{_shortened(row['problem'])}\n  {_shortened(row['completion'])}  ({VERDICTS[row['correct']]})"
                )
        _print_line(f"Answers: {writer.path}")


def _shortened(text: str) -> str:
    """A text on one line, cut in the middle: its answer stands at the end."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_SHOWN else f"{line[: MOST_SHOWN // 2]} ... {line[-MOST_SHOWN // 2 :]}"


def _print_line(text: str) -> None:
    _wide_console().print(text, soft_wrap=True, highlight=False, markup=False)


def _wide_console() -> Console:
    """A console for tables; no column is cut where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 160)
