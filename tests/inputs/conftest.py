"""Fixtures that run the command line as a process, and the smallest config that trains."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from smallest_config import put, smallest_config

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "1000", "CUDA_VISIBLE_DEVICES": ""}


class Ended(NamedTuple):
    """How a run of the command line ended."""

    code: int | None
    """None if the run was killed at its time limit."""
    seconds: float
    output: str
    orphans: list[str]
    """Command lines of processes that outlived the run."""


Start = Callable[..., Ended]
"""``start(folder, *arguments, environment=..., seconds=...)``"""


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    """Runs the command line in forks of a warm process."""
    program = str(Path(__file__).with_name("warm_process.py"))
    environment = os.environ | ENVIRONMENT
    with subprocess.Popen(
        [sys.executable, program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(
            folder: Path,
            *arguments: str,
            environment: Mapping[str, str] | None = None,
            seconds: float = 60.0,
            file_size: int | None = None,
        ) -> Ended:
            request = {"folder": str(folder), "arguments": arguments, "seconds": seconds, "file_size": file_size}
            process.stdin.write(json.dumps(request | {"environment": dict(environment or {})}) + "\n")
            process.stdin.flush()
            return Ended(**json.loads(process.stdout.readline()))

        yield run
        process.stdin.close()


@dataclass
class Run:
    """A valid config in a folder of its own, which a test then makes invalid."""

    folder: Path
    config: Any
    """A mapping, or the raw bytes of the config file."""
    subcommand: str = "fit"
    arguments: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any) -> None:
        """Set a config value by its dotted key, as in "data.num_problems"."""
        put(self.config, key, value)

    @property
    def command(self) -> list[str]:
        """Write the config to a file and return the command-line arguments."""
        path = self.folder / "run.yaml"
        path.write_bytes(self.config if isinstance(self.config, bytes) else yaml.safe_dump(self.config).encode())
        return [self.subcommand, f"--config={path}", *self.arguments]


@pytest.fixture(scope="session")
def smallest() -> Callable[[Path, str], Run]:
    """Builds the smallest valid run in a folder, with the given model."""
    return _smallest


def _smallest(folder: Path, model: str) -> Run:
    """One epoch of SFT and one of EGSPO, which take seconds."""
    return Run(folder, smallest_config(folder, model))
