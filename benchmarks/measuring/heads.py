"""Ways from hidden states to log-probabilities and entropies: the plain one, ours, and those of the field."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from egspo_lightning.ops.token_stats import token_stats

Statistics = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(N, D) hidden states, (V, D) weight, (N,) ids to log-probabilities and, where it has them, entropies."""


class Way(NamedTuple):
    """One of them."""

    statistics: Statistics
    logits_held: float
    """(N, V) float32 tensors that it holds at once, about: to see beforehand whether it fits"""
    remark: str = ""
    package: str | None = None


def naive(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """All at once, as a formula is written down."""
    return _of_logits(F.linear(hidden, weight), ids)


def _of_logits(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = logits.float().log_softmax(-1)
    return log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)


def chunked_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits at once, what is made of them in chunks of 256 tokens that are made anew in the backward pass."""
    pairs = zip(F.linear(hidden, weight).split(256), ids.split(256), strict=True)
    parts = [checkpoint(_of_logits, logits, part, use_reentrant=False) for logits, part in pairs]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def ours(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The project's own."""
    stats = token_stats(hidden, weight, ids)
    return stats.logprobs, stats.entropies


def trl_logits(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's functions of logits."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logprobs, entropies = selective_log_softmax_and_entropy(F.linear(hidden, weight).unsqueeze(0), ids.unsqueeze(0))
    return logprobs[0], entropies[0]


def trl_fused(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What TRL's GRPOTrainer computes: tiles over tokens and vocabulary, with the width that TRL sets."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH

    outputs = ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, WIDTH, None, 1.0, ("entropy",))
    return outputs[0], outputs[1]


def liger_chunked(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, None]:
    """What Liger's fused GRPO loss makes log-probabilities with."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    logprobs = LigerFusedLinearPPOBase.chunk_forward(hidden.unsqueeze(0), weight, ids.unsqueeze(0))
    return logprobs[0], None


WAYS = {
    "naive": Way(naive, 6.0),
    "chunked logits": Way(chunked_logits, 2.5),
    "ours": Way(ours, 0.1),
    "TRL, of logits": Way(trl_logits, 5.0, package="trl"),
    "TRL, fused head": Way(trl_fused, 1.0, package="trl"),
    "Liger, fused head": Way(liger_chunked, 0.5, "log-probabilities alone", package="liger_kernel"),
}


def absence(name: str) -> str | None:
    """Why a way does not run here, or None."""
    package = WAYS[name].package
    return None if package is None or find_spec(package) is not None else f"{package} is not installed"
