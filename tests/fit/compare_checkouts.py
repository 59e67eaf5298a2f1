"""Compares the golden runs of two checkouts bitwise, on one machine.

    python tests/fit/compare_checkouts.py A B [--jobs 2] [--runs NAME ...]

A and B are folders of checkouts or git revisions of this repository. The runs and the recorder come from the checkout
that has this script; package and configs come from A and B. The exit code is 1 if any run differs.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from golden_runs import HERE, RUNS, Recorded, record_all


@contextmanager
def checkout(name: str) -> Iterator[Path]:
    """Yield the folder of that name, or a temporary worktree of the git revision of that name."""
    if Path(name).is_dir():
        yield Path(name).resolve()
        return
    git = ["git", "-C", str(HERE), "worktree"]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "checkout"
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), name], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def first_difference(a: Recorded, b: Recorded) -> str | None:
    """Describe the first value that differs in any bit, or return None."""
    if len(a["steps"]) != len(b["steps"]):
        return f"number of optimizer steps: {len(a['steps'])} and {len(b['steps'])}"
    for i, (step, other) in enumerate(zip(a["steps"], b["steps"], strict=True)):
        for name in [*step, *(name for name in other if name not in step)]:
            if repr(step.get(name)) != repr(other.get(name)):  # repr tells -0.0 from 0.0, and NaN equals NaN
                return f"optimizer step {i + 1}, {name}: {step.get(name)!r} and {other.get(name)!r}"
    if a["weights"] != b["weights"]:
        return f"final weights: {a['weights']} and {b['weights']}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", help="folder or git revision")
    parser.add_argument("b", help="folder or git revision")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    arguments = parser.parse_args()
    is_different = False
    with ExitStack() as stack:
        folders = [stack.enter_context(checkout(name)) for name in (arguments.a, arguments.b)]
        runs = [(name, folder) for name in arguments.runs for folder in folders]
        results = record_all(runs, arguments.jobs)
        for name, a, b in zip(arguments.runs, results, results, strict=True):
            difference = first_difference(a, b)
            is_different |= difference is not None
            print(f"{name}: {difference or 'equal'}", flush=True)
    return int(is_different)


if __name__ == "__main__":
    sys.exit(main())
