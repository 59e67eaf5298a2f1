"""Helpers for runs of the command line in other processes: start, read metrics, compare metrics."""

import csv
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import psutil
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
"""Overrides of the smaller runs of ``run_ranks``: the quickstart with fewer phases."""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SFT_ON_TWO_RANKS = [
    *("-m", "egspo_lightning", "fit"),
    "--config=configs/quickstart.yaml",
    "--trainer.devices=2",
    "--data.demonstrations.init_args.num_demonstrations=128",
    "--data.sft_batch_size=16",
    "--data.benchmarks=null",
    "--stage_transition.after_epochs=1",
]
"""Arguments of Python for a quickstart on two ranks whose SFT is one short phase."""


def run_in_group(command: Sequence[str], cwd: Path, timeout: float = 240, **environment: str) -> tuple[str, int]:
    """Run a command in its own process group with a time limit; return its output and exit code."""
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


def processes_of(session: int) -> list[psutil.Process]:
    """All live processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            pass
    return found


def run_until_all_end(command: Sequence[str], cwd: Path, log: Path, timeout: float = 90, **environment: str) -> str:
    """Run a command that must fail in time, and leave no process behind ten seconds later; return its output."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=timeout)
            deadline = time.monotonic() + 10
            while processes_of(process.pid) and time.monotonic() < deadline:
                time.sleep(0.2)
            left = [" ".join(p.cmdline()) for p in processes_of(process.pid)]
        finally:
            for each in processes_of(process.pid):
                os.kill(each.pid, signal.SIGKILL)
    text = log.read_text()
    assert code != 0, text
    assert not left, text
    return text


def run_forked(arguments: Sequence[str]) -> int:
    """Run ``fit ARGUMENTS`` in a fork of this process; return its exit code, or minus the number of a signal."""
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


def read_rows(folder: Path) -> Rows:
    """Read the rows of phases and benchmarks that CSVLogger wrote for the one run in a folder.

    Rows with charts of tokens are skipped, because they show rank 0 only.
    """
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["loss/total"] or any(row[name] for name in row if name.startswith("eval/"))]


def compare_metrics(rows: Rows, expected: Rows, rel: float = 1e-4) -> int:
    """Assert that two runs have equal metrics, apart from times; return the number of compared values."""
    assert len(rows) == len(expected)
    compared = 0
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            if value and not name.startswith("time/") and name != "rollout/tokens_per_second":
                assert float(row[name]) == pytest.approx(float(value), rel=rel, abs=1e-5), name
                compared += 1
    return compared
