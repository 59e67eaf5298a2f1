"""The policy as it was when a phase began, to be sampled from in another thread while the one in training goes on."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from egspo_lightning.models.networks import Networks
from egspo_lightning.types import Scores


class CancelledError(Exception):
    """What ends the forward passes of a snapshot that nobody needs any more."""


class Snapshot:
    """A copy of all that is trained, in eval mode; what is frozen, as the model under adapters, is shared.

    Nothing in it is the thread's or the process's own: gradients and autocast, which torch keeps by thread, are set
    where it is entered, and no other rank is talked to, whose main threads are busy talking about gradients.

    Args:
        networks: Those in training; their copy is made here, and made anew by ``refresh``.
        tokenizer: The policy's.
        eos_ids: The tokens that end a completion.
        precision: Enters the precision of training.
        takes_sampled_statistics: As of the policy in training.
        world_size: Ranks.
    """

    def __init__(
        self,
        networks: Networks,
        tokenizer: Any,
        eos_ids: list[int],
        precision: Callable[[], AbstractContextManager[Any]],
        takes_sampled_statistics: bool,
        world_size: int,
    ) -> None:
        self.tokenizer, self.eos_ids, self.temperature = tokenizer, eos_ids, networks.temperature
        self.takes_sampled_statistics, self.policy_version = takes_sampled_statistics, 0
        self._precision, self._world_size = precision, world_size
        self._networks = _copy(networks)
        self._cancelled = threading.Event()
        for trunk in _trunks(self._networks):
            trunk.register_forward_pre_hook(self._end_if_cancelled)
        self.device = next(networks.policy.parameters()).device
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def refresh(self, networks: Networks, policy_version: int) -> None:
        """Be what these networks are now, after so many optimizer steps, in the memory that is there already."""
        self._cancelled.clear()
        self.policy_version = policy_version
        with torch.no_grad():
            for own, trained in zip(_tensors(self._networks), _tensors(networks), strict=True):
                if own is not trained:
                    own.copy_(trained)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Queue this thread's work on a GPU on a stream of its own; all of it is done in the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def cancel(self) -> None:
        """Let the next forward pass, and those after it, raise ``CancelledError``."""
        self._cancelled.set()

    def _end_if_cancelled(self, *_: Any) -> None:
        if self._cancelled.is_set():
            raise CancelledError

    @contextmanager
    def sampling(self) -> Iterator[Any]:
        """The causal language model, without gradients, in the precision of training."""
        with torch.no_grad(), self._precision():
            yield self._networks.policy.lm

    scoring = sampling

    def score(self, input_ids: Tensor, completion_mask: Tensor) -> Scores:
        """Statistics of given sequences under the copies and the reference."""
        with self.scoring():
            return self._networks.score(input_ids.to(self.device), completion_mask.to(self.device))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The values themselves, of a single rank.

        Raises:
            RuntimeError: there are more, with which another thread cannot talk.
        """
        if self._world_size > 1:
            raise RuntimeError("A snapshot was asked to talk to other ranks, whose main threads it would confuse.")
        return values


def _copy(networks: Networks) -> Networks:
    """What is trained is copied, and what is frozen shared."""
    policy, critic = (_copy_network(part) for part in (networks.policy, networks.critic))
    return replace(networks, policy=policy, critic=critic)


def _copy_network(network: Any) -> Any:
    """In eval mode. Parameters still say that they want gradients, by which torch chooses how to multiply."""
    if network is None:
        return None
    shared = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    return copy.deepcopy(network, shared).eval()


def _tensors(networks: Networks) -> list[Tensor]:
    """Of policy and critic; the reference is frozen."""
    parts = [part for part in (networks.policy, networks.critic) if part is not None]
    return [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]


def _trunks(networks: Networks) -> list[nn.Module]:
    """What every forward pass of the copies goes through."""
    critic = [] if networks.critic is None else [networks.critic.trunk]
    return [networks.policy.lm.get_decoder(), *critic]
