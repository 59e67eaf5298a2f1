"""Weight file: other readers of safetensors understand it, and its memory is freed."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from egspo_lightning.models.weight_file import weight_file

WEIGHTS = {
    "a.weight": torch.arange(6.0).view(2, 3).T,
    "b": torch.randn(4, dtype=torch.bfloat16),
    "empty": torch.ones(0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_file_is_a_safetensors_file(dtype):
    with weight_file(iter(WEIGHTS.items()), len(WEIGHTS), dtype) as path, safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    assert found.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value.to(dtype))


def test_weight_file_is_gone_afterwards_also_after_an_error():
    before = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))

    def failing():
        yield from WEIGHTS.items()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), weight_file(failing(), len(WEIGHTS), torch.float32):
        pass
    with weight_file(WEIGHTS.items(), len(WEIGHTS), torch.float32) as path:
        assert Path(path).stat().st_size > 0
    assert (set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))) == before
