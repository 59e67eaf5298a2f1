"""Runs of the command line in processes of their own, and what their metrics say."""

import csv
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import pytest

from egspo_lightning.cli.main import main

Rows = list[dict[str, str]]
SHORT_QUICKSTART = [
    "--trainer.max_epochs=90",
    "--data.demonstrations.init_args.num_demonstrations=800",
    "--data.sft_batch_size=64",
    "--data.reward=egspo_lightning.rewards.functions.CorrectnessReward",
    '--data.benchmarks=[{"class_path":"egspo_lightning.evaluation.benchmarks.GeneratedBenchmark"}]',
    "--data.num_problems=16",
    "--data.num_generations=8",
    "--data.max_completion_length=64",
    "--stage_transition.after_epochs=40",
    "--stage_transition.learning_rate=1e-4",
    "--checkpoint.every_n_epochs=1000",
]
"""The quickstart, from SFT on, for the smaller runs of ``run_ranks`` to grow into."""


def in_group(command: Sequence[str], cwd: Path, timeout: float = 240, **environment: str) -> tuple[str, int]:
    """Output and exit code of a command that runs in a process group of its own, with a time limit."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return output, process.returncode


def forked(arguments: Sequence[str]) -> int:
    """How ``fit ARGUMENTS`` ends in a fork of this process: its exit code, or minus the number of a signal."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            main(["fit", *arguments])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def rows_of(folder: Path) -> Rows:
    """What CSVLogger has written of phases and benchmarks, of the one run in a folder.

    Charts of single tokens are left out: they are those of the first rank.
    """
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["loss/total"] or any(row[name] for name in row if name.startswith("eval/"))]


def told_apart(rows: Rows, expected: Rows, rel: float = 1e-4) -> int:
    """Compares two runs' metrics, but those of time, and gives the number that were compared."""
    assert len(rows) == len(expected)
    compared = 0
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            if value and not name.startswith("time/") and name != "rollout/tokens_per_second":
                assert float(row[name]) == pytest.approx(float(value), rel=rel, abs=1e-5), name
                compared += 1
    return compared
