"""Logits in tiles of tokens x vocabulary, so that the whole (N, V) never exists at once."""

import torch
from torch import Tensor

CPU_TILE, GPU_TILE = 2**21, 2**25
"""Default number of logits in a tile: 8 MiB in float32 on a CPU, 128 MiB on a GPU."""

TILE_TOKENS = 2048
"""Default number of tokens in a tile: each tile of the head is read, and its gradient written, once for all of them."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of softmax and entropy: float64 for float64, else float32."""
    return dtype if dtype == torch.float64 else torch.float32


def tile_shape(
    num_tokens: int, num_entries: int, device: str, chunk_size: int | None = None, vocab_chunk_size: int | None = None
) -> tuple[int, int]:
    """Tokens and vocabulary entries of a tile; None takes the default for the device type, see ``token_stats``."""
    elements = CPU_TILE if device == "cpu" else GPU_TILE
    height = min(chunk_size or max(TILE_TOKENS, elements // num_entries), max(num_tokens, 1))
    return height, min(vocab_chunk_size or max(elements // height, 1), num_entries)


class LogitTiles:
    """Cuts tokens x vocabulary into tiles and computes the logits of one tile into a reused buffer.

    Shapes: hidden (N, D), weight (V, D), bias (V,). ``chunk_sizes`` are tokens and vocabulary entries of a tile, see
    ``tile_shape``. ``probs`` is the (N, V) softmax, if the forward pass kept it.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        chunk_sizes: tuple[int | None, int | None],
        probs: Tensor | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.temperature, self.probs = hidden, weight, bias, temperature, probs
        num_tokens, num_entries = len(hidden), len(weight)
        height, width = tile_shape(num_tokens, num_entries, hidden.device.type, *chunk_sizes)
        self.tokens = [slice(i, min(i + height, num_tokens)) for i in range(0, num_tokens, height)]
        self.entries = [slice(i, min(i + width, num_entries)) for i in range(0, num_entries, width)]
        self._size, self._buffers = height * width, dict[tuple[str, torch.dtype], Tensor]()

    @property
    def is_single(self) -> bool:
        """Whether one tile holds everything."""
        return len(self.tokens) == len(self.entries) == 1

    def logits(self, tokens: slice, entries: slice) -> Tensor:
        """(n, v) logits over the temperature, float32 or wider, in a buffer that the next call overwrites."""
        hidden, weight = self.hidden[tokens], self.weight[entries]
        product = self.buffer("product", torch.Size((len(hidden), len(weight))), hidden.dtype)
        if self.bias is None:
            torch.mm(hidden, weight.T, out=product)
        else:
            torch.addmm(self.bias[entries], hidden, weight.T, out=product)
        wide = wide_dtype(hidden.dtype)
        logits = product if hidden.dtype == wide else self.buffer("wide", product.shape, wide).copy_(product)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """(n, v), contiguous, with undefined content."""
        if (name, dtype) not in self._buffers:
            self._buffers[name, dtype] = self.hidden.new_empty(self._size, dtype=dtype)
        return self._buffers[name, dtype][: shape.numel()].view(shape)


def columns_of(input_ids: Tensor, entries: slice) -> tuple[Tensor, Tensor]:
    """Column of each token within a tile, (n, 1), clamped into it; and whether the tile has the token, (n,)."""
    columns, width = input_ids - entries.start, entries.stop - entries.start
    return columns.clamp(0, width - 1).unsqueeze(-1), (columns >= 0) & (columns < width)
