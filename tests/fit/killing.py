"""Runs that are killed with SIGKILL at chosen moments and resume.

    python killing.py FOLDER MOMENT:COUNT ... -- ARGUMENTS

runs ``fit ARGUMENTS`` once per moment in a forked process, which saves imports. Each run resumes from the one before
(``--ckpt_path last``). The last moment is ``never:0``. FOLDER/ends gets one line per run: moment and exit status.
"""

import os
import signal
import sys
from functools import wraps
from pathlib import Path

from lightning.pytorch import Callback

from egspo_lightning.callbacks import token_records
from egspo_lightning.checkpointing import atomic_files
from processes import run_forked

MOMENTS = ("sft", "sampling", "grading", "update", "half", "whole", "replaced", "recording")


class Kill(Callback):
    """Kills its process at the ``count``-th event of a kind.

    sft and update: before or after an optimizer step of stage SFT or EGSPO. sampling: a batch of completions is
    decoded. grading: completions are graded. half, whole and replaced: a checkpoint is half written, written but not
    yet renamed, and renamed. recording: one of the two tables of a rollout batch is written.
    """

    def __init__(self, moment: str, count: int) -> None:
        self.moment, self.left = moment, count

    def _event(self, moment: str) -> None:
        if moment == self.moment:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def on_train_start(self, trainer, pl_module):
        """Patch classes; the process has no other run."""
        grader, engine = type(trainer.datamodule.reward.grader), type(trainer.datamodule.engine)
        grade, stream, replace, write = grader.grade, engine.stream, atomic_files.replace, token_records.write

        def graded(*args):
            grades = grade(*args)
            self._event("grading")
            return grades

        @wraps(stream)  # the parser checks the signature when it dumps the config
        def streamed(*args, **kwargs):
            for batch in stream(*args, **kwargs):
                yield batch
                self._event("sampling")

        def replaced(partial, path):
            if self.moment == "half" and self.left == 1 and partial.is_file():
                os.truncate(partial, partial.stat().st_size // 2)
            self._event("half")
            self._event("whole")
            replace(partial, path)
            self._event("replaced")

        def recorded(tables, *place):
            for kind, table in tables.items():
                write({kind: table}, *place)
                self._event("recording")

        grader.grade, engine.stream = graded, streamed
        atomic_files.replace, token_records.write = replaced, recorded

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._event("sft" if pl_module.stage == "sft" else "update")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._event("sft" if pl_module.stage == "sft" else "update")


def exit_status(moment: str, count: str, arguments: list[str]) -> str:
    """Execute a run; return the name of the signal that ended it, or its exit code."""
    kill = f"--trainer.callbacks={{class_path: killing.Kill, init_args: {{moment: {moment}, count: {count}}}}}"
    code = run_forked([*arguments, kill, "--ckpt_path=last"])
    return signal.Signals(-code).name if code < 0 else str(code)


if __name__ == "__main__":
    split = sys.argv.index("--")
    folder, moments, arguments = Path(sys.argv[1]), sys.argv[2:split], sys.argv[split + 1 :]
    for moment in moments:
        status = exit_status(*moment.split(":"), arguments)
        with (folder / "ends").open("a") as file:
            file.write(f"{moment} {status}\n")
