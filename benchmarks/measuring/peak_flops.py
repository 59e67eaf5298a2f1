"""Peak of a GPU's bfloat16 matrix products: from the data sheet or, for an unknown name, measured."""

import re
import time

import torch

from measuring.phase_readings import synchronize

BF16_TFLOPS = {
    r"B200": 2250.0,
    r"H100 PCIe": 756.0,
    r"H[12]00 NVL": 835.0,
    r"G?H[12]00": 989.0,
    r"A100": 312.0,
    r"L40S": 362.0,
    r"L40": 181.0,
    r"L4": 121.0,
    r"A10": 125.0,
    r"RTX 6000 Ada": 364.0,
    r"RTX 4090": 165.0,
    r"RTX 3090": 71.0,
}
"""TFLOP/s of dense products with float32 accumulation, from NVIDIA's data sheets, by name; the first match counts."""


def known_peak(name: str) -> float | None:
    """TFLOP/s of the GPU with this name; None for an unknown one and for laptops, whose power limits differ."""
    if "Laptop" in name:
        return None
    return next((peak for pattern, peak in BF16_TFLOPS.items() if re.search(rf"\b{pattern}\b", name)), None)


def measured_peak(device: str, dtype: torch.dtype, size: int, repeats: int = 20) -> float:
    """TFLOP/s of products of two (size, size) matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        left @ right
    synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - started) / 1e12
