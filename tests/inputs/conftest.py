"""Runs of the command line as processes, and the smallest config that they all begin with."""

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

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "1000", "CUDA_VISIBLE_DEVICES": ""}


class Ended(NamedTuple):
    """How a run of the command line ended."""

    code: int | None
    """None where it did not end in time."""
    seconds: float
    output: str
    left: list[str]
    """Command lines of processes that outlived it."""


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
    """A config that runs, in a folder of its own, for a case to spoil."""

    folder: Path
    config: Any
    """A mapping, or what stands in the file in its place."""
    subcommand: str = "fit"
    arguments: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any) -> None:
        """Set "data.num_problems" and the like."""
        *parents, last = key.split(".")
        place = self.config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value

    @property
    def command(self) -> list[str]:
        """The arguments, with the config as a file."""
        path = self.folder / "run.yaml"
        path.write_bytes(self.config if isinstance(self.config, bytes) else yaml.safe_dump(self.config).encode())
        return [self.subcommand, f"--config={path}", *self.arguments]


def source(class_path: str, **arguments: Any) -> dict[str, Any]:
    """A class of this package with its arguments, as a config names it."""
    return {"class_path": f"egspo_lightning.{class_path}", "init_args": arguments}


@pytest.fixture(scope="session")
def smallest() -> Callable[[Path, str], Run]:
    """Gives the run that cases spoil."""
    return _smallest


def _smallest(folder: Path, model: str) -> Run:
    """An epoch of SFT and one of EGSPO, in seconds."""
    config = {
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": str(folder / "logs")},
        "model": {"policy": {"name_or_path": model, "from_scratch": True}},
        "data": {
            "demonstrations": source("data.generated_sources.GeneratedDemonstrations", num_demonstrations=8),
            "problems": source("data.generated_sources.GeneratedProblems"),
            "prompt": {"system": "", "plain": "{problem}"},
            "num_problems": 2,
            "num_generations": 2,
            "max_prompt_length": 16,
            "max_completion_length": 40,
        },
        "hf_export": {"enabled": False},
    }
    return Run(folder, config)
