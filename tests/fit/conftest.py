"""Runs of the command line on several real ranks, which talk through gloo."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

Runs = dict[str, list[str]]
"""Name of a run, and of its folder, to its arguments."""


@pytest.fixture(scope="session")
def run_ranks(repository: Path) -> Callable[..., dict[str, list[dict[str, str]]]]:
    """Does runs one after another in one program of ``num_ranks`` processes; the rows of metrics of each."""

    def run(folder: Path, runs: Runs, num_ranks: int = 2, num_nodes: int = 1) -> dict[str, list[dict[str, str]]]:
        program = [str(Path(__file__).with_name("runs_program.py")), str(folder), json.dumps(runs)]
        if num_nodes > 1:
            on_nodes(program, repository, num_nodes, num_ranks // num_nodes)
            return {name: rows_of(folder / name) for name in runs}
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        output, code = in_group([sys.executable, *([] if num_ranks == 1 else torchrun), *program], repository)
        assert code == 0, output
        return {name: rows_of(folder / name) for name in runs}

    return run


def on_nodes(program: Sequence[str], cwd: Path, num_nodes: int, ranks_each: int) -> None:
    """A program under an agent of torchrun for each node, all on this machine, as docs/guides/scaling.md has it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ["-m", "torch.distributed.run", f"--nnodes={num_nodes}", f"--nproc-per-node={ranks_each}"]
    nodes += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    commands = [[sys.executable, *nodes, f"--node-rank={node}", *program] for node in range(num_nodes)]
    with ThreadPoolExecutor(num_nodes) as pool:
        for output, code in pool.map(lambda command: in_group(command, cwd), commands):
            assert code == 0, output


def in_group(command: Sequence[str], cwd: Path, timeout: float = 600) -> tuple[str, int]:
    """Output and exit code of a command that runs in a process group of its own, with a time limit."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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


def rows_of(folder: Path) -> list[dict[str, str]]:
    """What CSVLogger has written of phases and benchmarks, of the one run in a folder."""
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["loss/total"] or any(row[name] for name in row if name.startswith("eval/"))]


@pytest.fixture(scope="session")
def told_apart() -> Callable[..., int]:
    """Compares two runs' metrics, but those of time, and gives the number that were compared."""

    def compare(rows: list[dict[str, str]], expected: list[dict[str, str]], rel: float = 1e-4) -> int:
        assert len(rows) == len(expected)
        compared = 0
        for row, other in zip(rows, expected, strict=True):
            for name, value in other.items():
                if value and not name.startswith("time/") and name != "rollout/tokens_per_second":
                    assert float(row[name]) == pytest.approx(float(value), rel=rel, abs=1e-5), name
                    compared += 1
        return compared

    return compare
