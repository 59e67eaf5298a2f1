"""Implementations of log-probabilities and entropies from hidden states: naive, chunked, ours, TRL, Liger."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from egspo_lightning.ops.token_stats import token_stats

Statistics = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(N, D) hidden states, (V, D) weight, (N,) ids to (N,) log-probabilities and (N,) entropies or None."""


class Variant(NamedTuple):
    """One implementation."""

    statistics: Statistics
    logits_held: float
    """estimated number of (N, V) float32 tensors held at once, to predict whether it fits into memory"""
    remark: str = ""
    package: str | None = None


def naive(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Materialize all logits."""
    return _from_logits(F.linear(hidden, weight), ids)


def _from_logits(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = logits.float().log_softmax(-1)
    return log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)


def chunked_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Materialize all logits, then checkpoint the statistics of chunks of 256 tokens."""
    pairs = zip(F.linear(hidden, weight).split(256), ids.split(256), strict=True)
    parts = [checkpoint(_from_logits, logits, part, use_reentrant=False) for logits, part in pairs]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def ours(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``token_stats`` of this package."""
    stats = token_stats(hidden, weight, ids)
    return stats.logprobs, stats.entropies


def trl_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's function of materialized logits."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logprobs, entropies = selective_log_softmax_and_entropy(F.linear(hidden, weight).unsqueeze(0), ids.unsqueeze(0))
    return logprobs[0], entropies[0]


def trl_fused(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The fused head of TRL's GRPOTrainer, with tiles over tokens and vocabulary of TRL's size."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH

    outputs = ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, WIDTH, None, 1.0, ("entropy",))
    return outputs[0], outputs[1]


def liger_chunked(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, None]:
    """The log-probabilities of Liger's fused GRPO loss."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    logprobs = LigerFusedLinearPPOBase.chunk_forward(hidden.unsqueeze(0), weight, ids.unsqueeze(0))
    return logprobs[0], None


VARIANTS = {
    "naive": Variant(naive, 6.0),
    "chunked logits": Variant(chunked_logits, 2.5),
    "ours": Variant(ours, 0.1),
    "TRL, from logits": Variant(trl_logits, 5.0, package="trl"),
    "TRL, fused head": Variant(trl_fused, 1.0, package="trl"),
    "Liger, fused head": Variant(liger_chunked, 0.5, "log-probabilities only", package="liger_kernel"),
}


def missing_package(name: str) -> str | None:
    """The package that a variant needs and that is not installed, or None."""
    package = VARIANTS[name].package
    return package if package is not None and find_spec(package) is None else None
