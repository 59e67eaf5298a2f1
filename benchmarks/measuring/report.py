"""Flags, tables and result files of the speed and memory benchmarks."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from egspo_lightning.analysis.markdown_table import markdown_table
from egspo_lightning.cli.comparison.provenance import machine, num_cores
from egspo_lightning.errors import UserError
from measuring.script import command
from measuring.workloads import FOLDER, NAMES

RESULTS = Path(__file__).parents[1] / "results"

Row = Mapping[str, Any]


def parser(name: str, description: str, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the shared flags."""
    result = argparse.ArgumentParser(description=description, allow_abbrev=False)
    result.add_argument("--rounds", type=int, default=rounds, help=f"measurements per variant ({rounds})")
    result.add_argument("--threads", type=int, default=num_cores(), help="torch threads (number of cores)")
    output = RESULTS / f"{name}.json"
    result.add_argument("--output", type=Path, default=output, help=f"JSON file for the results ({output.name})")
    result.add_argument("--note", default="", help="note for the result file, such as other load on the machine")
    return result


def add_workloads(flags: argparse.ArgumentParser, *default: str) -> None:
    """Add the flags that choose the trained models."""
    choices = "; ".join(f"{name}: {description}" for name, description in NAMES.items())
    flags.add_argument("--workloads", nargs="+", choices=list(NAMES), default=list(default), help=choices)
    add_models(flags)


def add_models(flags: argparse.ArgumentParser) -> None:
    """Add the flag for the folder of models."""
    flags.add_argument("--models", type=Path, default=FOLDER, help="folder that keeps the models (logs/speed)")


def add_run_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flag that forwards flags to the command line of egspo_lightning."""
    flags.add_argument("--flags", nargs="*", default=[], help="more flags for `egspo_lightning fit`")


def parse(flags: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and validate the flags, and set the number of torch threads.

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
    """Print the tables and write them to the result file with their provenance."""
    for title, rows in tables.items():
        print(f"\n{title}\n\n{table(rows)}")
    where = machine()
    document = {
        "benchmark": name,
        "command": command(),
        "note": arguments.note,
        "machine": where,
        "settings": {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)},
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "tables": {title: [dict(row) for row in rows] for title, rows in tables.items()},
        **facts,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=1, default=list) + "\n")
    print(f"\n{where['processor']}; {where['versions']}; {where['revision']}; load {where['load']}")
    print(f"Written: {arguments.output}")


def table(rows: Sequence[Row]) -> str:
    """Format rows with the same keys as a Markdown table."""
    header = list(rows[0])
    return markdown_table(header, ([_cell(row[name]) for name in header] for row in rows))


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
