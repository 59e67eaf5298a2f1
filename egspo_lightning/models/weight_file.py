"""Weight file: a safetensors file in shared memory, which another process of this node reads."""

import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO

import torch
from torch import Tensor

HEADER_BYTES_PER_NAME = 512
"""Room for a name with its dtype, shape and offsets."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of the dtypes in a safetensors file."""


@contextmanager
def weight_file(weights: Iterable[tuple[str, Tensor]], num_names: int, dtype: torch.dtype) -> Iterator[str]:
    """Write weights into a file in shared memory, one at a time, and yield its path; the memory is freed afterwards.

    The file has no name in a folder: it exists as long as a process has it open, so a killed process leaves nothing
    behind. Its size does not depend on the size of /dev/shm. Processes of the same user can open the path, if they see
    this process under its number (the same node and the same container).

    Args:
        weights: names and tensors
        num_names: at least the number of weights
        dtype: floating-point type to which they are rounded
    """
    with os.fdopen(os.memfd_create("egspo-weights"), "w+b") as file:
        _write(file, weights, num_names, dtype)
        file.flush()
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _write(file: IO[bytes], weights: Iterable[tuple[str, Tensor]], num_names: int, dtype: torch.dtype) -> None:
    """Write the tensors, and then the header before them, whose offsets are known only now.

    The format is a length (8 bytes), a JSON header that spaces may follow, and the bytes of the tensors.
    """
    room, end, header = HEADER_BYTES_PER_NAME * (num_names + 1), 0, {}
    file.seek(8 + room)
    for name, weight in weights:
        data = weight.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy()
        file.write(data.data)
        offsets = [end, end := end + data.nbytes]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(weight.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    assert len(text) <= room, "the names of the parameters are short"
    file.seek(0)
    file.write(struct.pack("<Q", room) + text.ljust(room))
