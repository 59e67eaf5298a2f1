"""A sample of the half-precision weights in training, to measure which share of them the optimizer moves."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

HALF_PRECISION = (torch.bfloat16, torch.float16)
NUM_SAMPLED = 65_536
"""Weights in a sample, about, on each rank."""


class WeightSample:
    """Every n-th trainable weight in half precision, as it was when the sample was taken; empty in float32."""

    def __init__(self, module: nn.Module) -> None:
        self.before = [weights.clone() for weights, _ in _sampled(module)]

    def count_moved(self, module: nn.Module) -> Tensor:
        """Number of weights that have moved since, and of all, on this rank. (2,) float64

        Weights without a gradient in the latest optimizer step are left out: embeddings of tokens that no text has,
        experts that no token reached, and all weights if the step was skipped.
        """
        counts = torch.zeros(2, dtype=torch.float64)
        for (weights, gradients), before in zip(_sampled(module), self.before, strict=True):
            if gradients is not None:
                has_moved = (weights != before)[gradients != 0]
                counts += torch.tensor([has_moved.sum().item(), has_moved.numel()])
        return counts


def _sampled(module: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """This rank's sampled weights of each parameter, with their gradients."""
    parameters = [p for p in module.parameters() if p.requires_grad and p.dtype in HALF_PRECISION]
    every = max(sum(_own(p).numel() for p in parameters) // NUM_SAMPLED, 1)
    for parameter in parameters:
        gradient = None if parameter.grad is None else _own(parameter.grad).flatten()[::every]
        yield _own(parameter).detach().flatten()[::every], gradient


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
