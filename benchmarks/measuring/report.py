"""Flags, tables and files of the benchmarks of speed and memory."""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from comparison.arguments import command
from comparison.machine import machine, num_cores
from egspo_lightning.errors import UserError
from measuring.workloads import FOLDER, NAMES

RESULTS = Path(__file__).parents[1] / "results"

Row = Mapping[str, Any]


def parser(name: str, description: str, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the flags that all of them have."""
    result = argparse.ArgumentParser(description=description, allow_abbrev=False)
    result.add_argument("--rounds", type=int, default=rounds, help=f"times that each side is measured ({rounds})")
    result.add_argument("--threads", type=int, default=num_cores(), help="threads of torch (the number of cores)")
    output = RESULTS / f"{name}.json"
    result.add_argument("--output", type=Path, default=output, help=f"JSON file of the results ({output.name})")
    result.add_argument("--note", default="", help="goes into the file, for instance what else the machine was doing")
    return result


def add_workloads(flags: argparse.ArgumentParser, *default: str) -> None:
    """What is trained."""
    told = "; ".join(f"{name}: {what}" for name, what in NAMES.items())
    flags.add_argument("--workloads", nargs="+", choices=list(NAMES), default=list(default), help=told)
    add_models(flags)


def add_models(flags: argparse.ArgumentParser) -> None:
    """Where models are kept."""
    flags.add_argument("--models", type=Path, default=FOLDER, help="folder in which models are kept (logs/speed)")


def parse(flags: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked, with torch's threads set.

    Raises:
        UserError: a number is below 1.
    """
    arguments = flags.parse_args(argv)
    for name in ("rounds", "threads"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    torch.set_num_threads(arguments.threads)
    return arguments


def publish(name: str, arguments: argparse.Namespace, tables: Mapping[str, Sequence[Row]], **facts: Any) -> None:
    """Print the tables and write them with where they come from."""
    for title, rows in tables.items():
        print(f"\n{title}\n\n{table(rows)}")
    settings = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
    where = machine() | {"load": ", ".join(f"{load:.2f}" for load in os.getloadavg())}
    document = {
        "benchmark": name,
        "command": command(),
        "note": arguments.note,
        "machine": where,
        "settings": settings,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "tables": {title: [dict(row) for row in rows] for title, rows in tables.items()},
        **facts,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1, default=list) + "\n")
    print(f"\n{where['processor']}; {where['versions']}; {where['revision']}; load {where['load']}")
    print(f"Written: {arguments.output}")


def table(rows: Sequence[Row]) -> str:
    """Rows with the same keys as a Markdown table."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([_cell(row[head]) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
