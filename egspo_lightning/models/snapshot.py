"""Policy snapshot: a copy of the networks that another thread samples from while training continues."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from egspo_lightning.models.networks import Networks
from egspo_lightning.types import NetworkOutputs


class Snapshot:
    """A copy of the trained networks in eval mode; frozen weights, such as the model under adapters, are shared.

    Gradient mode and autocast, which torch keeps per thread, are set on entering. There are no collectives here: main
    threads may be in an all-reduce of gradients.

    Args:
        networks: The networks in training, copied here; ``refresh`` copies their weights again.
        precision: Returns a context with the precision of training.
        takes_sampled_statistics: Whether the engine's statistics can replace ``score``, as in training.
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
        self._networks = replace(networks, policy=_copy(networks.policy), critic=_copy(networks.critic))
        self._cancelled = threading.Event()
        for network in self._networks.trained:
            network.trunk.register_forward_pre_hook(self._end_if_cancelled)  # every forward pass goes through trunks
        self.device = next(networks.policy.parameters()).device
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def refresh(self, networks: Networks, policy_version: int) -> None:
        """Copy the networks' current weights, after ``policy_version`` optimizer steps, into the memory held here."""
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
        """Run this thread's GPU work on a separate stream, and wait for it on leaving."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def cancel(self) -> None:
        """Let all further forward passes raise ``CancelledError``."""
        self._cancelled.set()

    def _end_if_cancelled(self, *_: Any) -> None:
        if self._cancelled.is_set():
            raise CancelledError

    @contextmanager
    def sampling(self, *, whole: bool = True) -> Iterator[Any]:
        """Enter no-grad mode and the precision of training; gives the causal language model, which is always whole."""
        with torch.no_grad(), self._precision():
            yield self._networks.policy.lm

    scoring = sampling

    def score(self, input_ids: Tensor, completion_mask: Tensor) -> NetworkOutputs:
        """Scores of given sequences by the copies and the reference policy."""
        with self.scoring():
            return self._networks.score(input_ids.to(self.device), completion_mask.to(self.device))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The values themselves, on a single rank; a RuntimeError on several: only main threads may communicate."""
        if self._world_size > 1:
            raise RuntimeError("A snapshot cannot sum over ranks: collectives of their main threads would mix with it.")
        return values


def _copy(network: Any) -> Any:
    """A copy in eval mode, which shares frozen weights; None of None."""
    if network is None:
        return None
    shared = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    return copy.deepcopy(network, shared).eval()  # keeps requires_grad, by which torch chooses its kernels


def _tensors(networks: Networks) -> list[Tensor]:
    """Parameters and buffers of policy and critic."""
    return [tensor for part in networks.trained for tensor in (*part.parameters(), *part.buffers())]
