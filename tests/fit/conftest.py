"""Fixture for runs of the command line on several ranks, which communicate through gloo."""

import json
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from processes import Rows, read_rows, run_in_group

Runs = dict[str, list[str]]
"""Arguments of each run by its name, which is also the name of its folder."""


@pytest.fixture(scope="session")
def run_ranks(repository: Path) -> Callable[..., dict[str, Rows]]:
    """Execute runs one after another in one program of ``num_ranks`` processes; return their rows of metrics."""

    def run(folder: Path, runs: Runs, num_ranks: int = 2, num_nodes: int = 1) -> dict[str, Rows]:
        program = [str(Path(__file__).with_name("runs_program.py")), str(folder), json.dumps(runs)]
        if num_nodes > 1:
            run_on_nodes(program, repository, num_nodes, num_ranks // num_nodes)
            return {name: read_rows(folder / name) for name in runs}
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        output, code = run_in_group([sys.executable, *([] if num_ranks == 1 else torchrun), *program], repository, 600)
        assert code == 0, output
        return {name: read_rows(folder / name) for name in runs}

    return run


def run_on_nodes(program: Sequence[str], cwd: Path, num_nodes: int, ranks_each: int) -> None:
    """Run a program with one torchrun agent per node, all on this machine, as in docs/guides/scaling.md."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ["-m", "torch.distributed.run", f"--nnodes={num_nodes}", f"--nproc-per-node={ranks_each}"]
    nodes += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    commands = [[sys.executable, *nodes, f"--node-rank={node}", *program] for node in range(num_nodes)]
    with ThreadPoolExecutor(num_nodes) as pool:
        for output, code in pool.map(lambda command: run_in_group(command, cwd, 600), commands):
            assert code == 0, output
