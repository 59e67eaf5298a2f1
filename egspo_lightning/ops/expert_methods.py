"""Losses of methods that train on expert demonstrations: DFT, SRFT and HPT, unreduced, (B, T).

SRFT and HPT follow the implementation in Unify-Post-Training (arXiv 2509.04419), which wrote HPT, not SRFT.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from egspo_lightning.ops.losses import nll
from egspo_lightning.ops.masking import Values, as_floats, as_tensor, masked_mean

SRFT_SCALE = 0.5
SRFT_POSITIVE_SCALE = 0.1


def dft(logprobs: Values) -> Tensor:
    """DFT's ``-sg(p) log p``: the SFT loss, weighted by the token's own probability (arXiv 2508.05629).

    Its gradient with the log-probability is -p. It is token-mean in the authors' code and in TRL.
    """
    logprobs = as_floats(logprobs)
    return logprobs.detach().exp() * nll(logprobs)


def srft_expert(logprobs: Values, entropies: Values, mask: Values) -> Tensor:
    """SRFT's loss of demonstrations, ``-0.5 exp(-H_i) log p`` with H_i the mean entropy of sequence i.

    Source: arXiv 2506.19767. Its second loss on demonstrations is ``losses.off_policy``. H_i is of the current policy
    and detached; sequences that the policy is uncertain about weigh less.
    """
    return SRFT_SCALE * (-sequence_entropy(entropies, mask)).exp() * nll(logprobs)


def srft_policy(logprobs: Values, is_right: Values, entropies: Values, mask: Values) -> Tensor:
    """SRFT's loss of the policy's own completions: ``-0.1 exp(H_i) log p`` for right ones, else ``log p``.

    There are no group advantages, no ratio and no clip (arXiv 2506.19767).

    Args:
        logprobs, entropies, mask: (B, T)
        is_right: (B,) bool
    """
    weights = SRFT_POSITIVE_SCALE * sequence_entropy(entropies, mask).exp()
    return torch.where(as_tensor(is_right).bool().unsqueeze(-1), weights, -1.0) * nll(logprobs)


def sequence_entropy(entropies: Values, mask: Values) -> Tensor:
    """Mean entropy of each sequence, nats, (B, 1), detached; 0 for an empty one."""
    return masked_mean(as_floats(entropies).detach(), mask, -1).unsqueeze(-1)


class HPTSwitch(NamedTuple):
    """How HPT trains on each problem; bool, (P,). Where none is true, by RL on the policy's completions."""

    sft: Tensor
    """by SFT on a demonstration, in place of the completions"""
    off_policy: Tensor
    """by off-policy RL on a demonstration, in place of the completions"""


def hpt_switch(num_right: Values, *, gate: int, off_policy_gate: int) -> HPTSwitch:
    """HPT's switch, by the number of right completions of a problem (arXiv 2509.04419).

    SFT where ``num_right <= gate``, off-policy RL where ``num_right <= off_policy_gate``, RL elsewhere. With both at 0
    a problem without a right completion takes SFT. Negative gates never act.

    Args:
        num_right: (P,)
        gate: most right completions for SFT
        off_policy_gate: most right completions for off-policy RL
    """
    num_right = as_tensor(num_right)
    takes_sft = num_right <= gate
    return HPTSwitch(takes_sft, (num_right <= off_policy_gate) & ~takes_sft)
