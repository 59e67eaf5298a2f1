"""The flags that comparing and tuning share, and how a user's mistake is told."""

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
    add("--seeds", type=int, nargs="+", default=list(seeds), help="seeds; each has an SFT checkpoint of its own")
    add("--phases", type=int, default=160, help="rollout collections of each run (160)")
    add("--evaluate_every", type=int, default=20, help="phases between two points of the learning curve (20)")
    add("--output", type=Path, default=Path(output), help=f"folder of the results ({output})")
    add("--jobs", type=int, default=num_cores(), help="runs at the same time (the number of cores)")
    add("--threads", type=int, default=None, help="threads of a run (cores / jobs); figures depend on it by rounding")
    return result


def shared_settings(arguments: argparse.Namespace) -> Settings:
    """The settings of all runs, checked.

    Raises:
        UserError: a value is out of range, or a config or method is not there.
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
        raise UserError(f"--output: cannot make the folder {output}: {error.strerror}. Give another one.") from error
    return Settings(tuple(arguments.config), arguments.phases, arguments.evaluate_every, threads, output)


def command() -> str:
    """The command line, from the repository's root and without this machine's folders."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def told(main: Callable[[], int]) -> int:
    """The exit code: that of ``main``, 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Finished runs are kept: the same command goes on from there.", file=sys.stderr)
        return 130


def tell_failures(failures: dict[Run, Failure], output: Path) -> None:
    """One line a failed run."""
    for run, failure in failures.items():
        print(f"failed: {run.label}, seed {run.seed}: {failure} (see {run.error_file(output)})", file=sys.stderr)
    if failures:
        print(f"{len(failures)} runs have failed. The same command tries them again.", file=sys.stderr)
