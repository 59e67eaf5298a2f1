"""Exit codes of the benchmark scripts, and the command line for their result files."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from egspo_lightning.errors import UserError


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
        print("Interrupted. Tuning keeps finished runs; the same command resumes.", file=sys.stderr)
        return 130
