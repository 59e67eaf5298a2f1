"""Command-line flags of comparison and tuning, and the exit codes of all benchmark scripts."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from comparison.machine import num_cores
from comparison.plan import METHODS, Run, Settings, read_yaml, require_distinct, require_methods
from comparison.workers import Failure
from egspo_lightning.errors import UserError


def parser(description: str, *, seeds: Sequence[int], output: str) -> argparse.ArgumentParser:
    """A parser with the shared flags."""
    known = ", ".join(sorted(path.stem for path in METHODS.glob("*.yaml")))
    result = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = result.add_argument
    add("--config", type=Path, nargs="+", required=True, help="config files; a later one overrides an earlier one")
    add("--methods", nargs="+", required=True, metavar="METHOD", help=f"overlays in configs/methods: {known}")
    add("--seeds", type=int, nargs="+", default=list(seeds), help="seeds; each seed has its own SFT checkpoint")
    add("--phases", type=int, default=160, help="rollout batches per run (160)")
    add("--evaluate_every", type=int, default=20, help="phases between two points of the learning curve (20)")
    add("--output", type=Path, default=Path(output), help=f"folder for the results ({output})")
    add("--jobs", type=int, default=num_cores(), help="runs at the same time (number of cores)")
    add("--threads", type=int, default=None, help="torch threads per run (cores / jobs); they affect rounding")
    return result


def shared_settings(arguments: argparse.Namespace) -> Settings:
    """Validate the flags and return the settings that all runs share.

    Raises:
        UserError: a value is out of range, or a config or method does not exist.
    """
    for flag in ("phases", "evaluate_every", "jobs", "threads"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} must be at least 1, got {value}.")
    require_methods(arguments.methods)
    require_distinct(arguments.seeds, "--seeds")
    for seed in arguments.seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"--seeds: {seed} must be from 0 to 2**32 - 1.")
    for path in arguments.config:
        read_yaml(path)
    threads = arguments.threads or max(num_cores() // arguments.jobs, 1)
    output = arguments.output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot create the folder {output}: {error.strerror}. Use another one.") from error
    return Settings(tuple(arguments.config), arguments.phases, arguments.evaluate_every, threads, output)


def command() -> str:
    """The command line, relative to the repository root."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def exit_code(main: Callable[[], int]) -> int:
    """Run ``main`` and return its exit code; 2 after a UserError, 130 after Ctrl-C."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. Comparison and tuning keep finished runs; the same command resumes.", file=sys.stderr)
        return 130


def report_failures(failures: dict[Run, Failure], output: Path) -> None:
    """Print one line per failed run."""
    for run, failure in failures.items():
        print(f"failed: {run.label}, seed {run.seed}: {failure} (see {run.error_file(output)})", file=sys.stderr)
    if failures:
        print(f"{len(failures)} runs failed. The same command tries them again.", file=sys.stderr)
