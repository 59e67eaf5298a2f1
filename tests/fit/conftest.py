"""Runs of the command line on several real ranks, which talk through gloo."""

import json
import socket
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from processes import Rows, in_group, rows_of

Runs = dict[str, list[str]]
"""Name of a run, and of its folder, to its arguments."""


@pytest.fixture(scope="session")
def run_ranks(repository: Path) -> Callable[..., dict[str, Rows]]:
    """Does runs one after another in one program of ``num_ranks`` processes; the rows of metrics of each."""

    def run(folder: Path, runs: Runs, num_ranks: int = 2, num_nodes: int = 1) -> dict[str, Rows]:
        program = [str(Path(__file__).with_name("runs_program.py")), str(folder), json.dumps(runs)]
        if num_nodes > 1:
            on_nodes(program, repository, num_nodes, num_ranks // num_nodes)
            return {name: rows_of(folder / name) for name in runs}
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        output, code = in_group([sys.executable, *([] if num_ranks == 1 else torchrun), *program], repository, 600)
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
        for output, code in pool.map(lambda command: in_group(command, cwd, 600), commands):
            assert code == 0, output
