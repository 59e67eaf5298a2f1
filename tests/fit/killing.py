"""Runs that kill themselves, as power cuts and other people's `kill -9` do.

    python killing.py FOLDER MOMENT:COUNT ... -- ARGUMENTS

runs ``fit ARGUMENTS`` once for each moment, in a process forked from one that has imported everything, each taking up
what the killed one before has left (``--ckpt_path last``); the last moment is ``never:0``. FOLDER/ends gets a line for
each: the moment, and how its process ended.
"""

import os
import signal
import sys
from pathlib import Path

from lightning.pytorch import Callback

from egspo_lightning.callbacks import phase_checkpoint as checkpoint
from egspo_lightning.callbacks import token_records
from processes import forked

MOMENTS = ("sft", "sampling", "grading", "update", "half", "whole", "replaced", "recording")


class Kill(Callback):
    """Ends its process without a word at the ``count``-th time that something happens in it.

    sft and update: before or after an optimizer step of that stage; sampling: when a batch of completions has been
    decoded; grading: when completions have been graded; half, whole and replaced: a checkpoint is half written, has
    yet to take its name, and has taken it; recording: the first of the two tables of a collection is written.
    """

    def __init__(self, moment: str, count: int) -> None:
        self.moment, self.left = moment, count

    def _happens(self, moment: str) -> None:
        if moment == self.moment:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def on_train_start(self, trainer, pl_module):
        """The process is this run's alone, so classes can be changed."""
        grader, engine = type(trainer.datamodule.reward.grader), type(trainer.datamodule.engine)
        grade, stream, replace, write = grader.grade, engine.stream, checkpoint._replace, token_records.write

        def graded(*args):
            grades = grade(*args)
            self._happens("grading")
            return grades

        def streamed(*args, **kwargs):
            for batch in stream(*args, **kwargs):
                yield batch
                self._happens("sampling")

        def replaced(partial, path):
            if self.moment == "half" and self.left == 1 and partial.is_file():
                os.truncate(partial, partial.stat().st_size // 2)
            self._happens("half")
            self._happens("whole")
            replace(partial, path)
            self._happens("replaced")

        def recorded(tables, *place):
            for kind, table in tables.items():
                write({kind: table}, *place)
                self._happens("recording")

        grader.grade, engine.stream = graded, streamed
        checkpoint._replace, token_records.write = replaced, recorded

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._happens("sft" if pl_module.stage == "sft" else "update")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._happens("sft" if pl_module.stage == "sft" else "update")


def end_of(moment: str, count: str, arguments: list[str]) -> str:
    """How a run ended: the name of a signal, or an exit code."""
    kill = f"--trainer.callbacks={{class_path: killing.Kill, init_args: {{moment: {moment}, count: {count}}}}}"
    code = forked([*arguments, kill, "--ckpt_path=last"])
    return signal.Signals(-code).name if code < 0 else str(code)


if __name__ == "__main__":
    split = sys.argv.index("--")
    folder, moments, arguments = Path(sys.argv[1]), sys.argv[2:split], sys.argv[split + 1 :]
    for moment in moments:
        end = end_of(*moment.split(":"), arguments)
        with (folder / "ends").open("a") as file:
            file.write(f"{moment} {end}\n")
