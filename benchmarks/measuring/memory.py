"""Peak memory of a call: resident memory on a CPU, allocator statistics on a GPU."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from egspo_lightning.errors import UserError

MIB = 2**20


def peak(run: Callable[[], Any], device: str = "cpu") -> float:
    """Peak memory of a call in MiB, relative to the memory held before it."""
    return _peak_of_gpu(run) if device.startswith("cuda") else _peak_of_process(run)


def available() -> float:
    """Memory in MiB that new processes can use without swapping."""
    return _kib(Path("/proc/meminfo"), "MemAvailable") / 1024


def _peak_of_process(run: Callable[[], Any]) -> float:
    """Use Linux's high-water mark of resident memory, reset before the call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise reused free memory would not count
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise UserError(f"Peak memory needs Linux with /proc/self/clear_refs: {error}.") from error
    before = _kib(status, "VmRSS")
    run()
    return (_kib(status, "VmHWM") - before) / 1024


def _peak_of_gpu(run: Callable[[], Any]) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _kib(file: Path, field: str) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])
