"""Provenance of measurements: processor, library versions, git revision, load."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import egspo_lightning

PACKAGES = ("torch", "transformers", "lightning", "numpy")


def machine() -> dict[str, str]:
    """The machine, the software and the current load."""
    return {
        "processor": f"{_processor()}, {num_cores()} cores",
        "versions": ", ".join([f"Python {platform.python_version()}", *map(_version, PACKAGES)]),
        "revision": _revision(),
        "load": ", ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} -"


@cache
def _revision() -> str:
    """The commit, with a plus sign if the checkout has uncommitted changes; the version of an installed wheel."""
    root = Path(egspo_lightning.__file__).parents[1]
    if not (root / ".git").exists():
        return egspo_lightning.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
