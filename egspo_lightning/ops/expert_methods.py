"""Methods that train on expert demonstrations, DFT, SRFT and HPT: losses, unreduced, (B, T), and classes of a config.

SRFT and HPT follow the implementation in Unify-Post-Training (arXiv 2509.04419), which wrote HPT, not SRFT.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from egspo_lightning.ops.entropy_advantages import RIGHT_ABOVE
from egspo_lightning.ops.estimators import Estimate, Experience, GroupRelative
from egspo_lightning.ops.gate import confidence_phi
from egspo_lightning.ops.losses import nll
from egspo_lightning.ops.masking import Values, as_floats, as_tensor, masked_mean
from egspo_lightning.ops.token_methods import Surrogate
from egspo_lightning.ops.token_view import TokenView
from egspo_lightning.types import NonNegativeInt

ExpertWeighting = Literal["plain", "confidence", "dft", "srft"]

SRFT_SCALE = 0.5
SRFT_POSITIVE_SCALE = 0.1


def expert_nll(
    logprobs: Tensor, weighting: ExpertWeighting, *, mask: Tensor, entropies: Tensor | None = None
) -> Tensor:
    """The SFT loss of demonstrations: plain, or weighted by CHORD's p (1 - p), by DFT or by SRFT.

    Args:
        logprobs, mask, entropies: (B, T), of the current policy at temperature 1; only srft uses the entropies
    """
    match weighting:
        case "plain":
            return nll(logprobs)
        case "confidence":
            return confidence_phi(logprobs) * nll(logprobs)
        case "dft":
            return dft(logprobs)
    assert entropies is not None
    return srft_expert(logprobs, entropies, mask)


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


@dataclass(frozen=True)
class SRFT(Surrogate):
    """SRFT's loss of the policy's own completions, without advantages, ratio and clip; see ``srft_policy``.

    A completion is right if its reward is above 0.5. ``objective.expert_weighting: srft`` adds its loss of
    demonstrations.
    """

    needs_current_entropies: ClassVar[bool] = True
    needs_every_rollout: ClassVar[bool] = True
    """Rollouts of advantage 0 have a gradient."""

    def per_token(self, tokens: TokenView) -> Tensor:
        """The loss of each token, (B, T)."""
        return srft_policy(tokens.logprobs, tokens.rewards > RIGHT_ABOVE, tokens.current_entropies, tokens.mask)


@dataclass(frozen=True)
class HPT(GroupRelative):
    """HPT's switch: problems that the policy cannot solve train by SFT on their demonstration, others by RL.

    See ``hpt_switch``. It needs an expert solution in each group (``data.expert_fraction: 1``) and
    ``objective.expert_surrogate: nll``. An expert solution has advantage 1 where SFT takes its problem, otherwise 0;
    the completions there have 0. A completion is right if its reward is above 0.5.

    Args:
        gate: Most right completions of a problem that trains by SFT.
    """

    gate: NonNegativeInt = 0

    def estimate(self, experience: Experience) -> Estimate:
        """GRPO's advantages, 0 where SFT takes the problem."""
        takes_sft = self._takes_sft(experience.rewards.view(-1, experience.group_size))
        rows = takes_sft.repeat_interleave(experience.group_size).unsqueeze(1)
        return Estimate(torch.where(rows, 0.0, super().estimate(experience).advantages))

    def estimate_expert(self, rewards: Tensor, group_rewards: Tensor) -> Tensor:
        """(P,): 1 where SFT takes the problem, otherwise 0."""
        return self._takes_sft(group_rewards).to(rewards.dtype)

    def _takes_sft(self, group_rewards: Tensor) -> Tensor:
        return hpt_switch((group_rewards > RIGHT_ABOVE).sum(-1), gate=self.gate, off_policy_gate=self.gate).sft
