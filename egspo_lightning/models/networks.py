"""Policy, reference policy and critic: scored together, and held in eval mode with whole weights for inference."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from egspo_lightning.models import lora
from egspo_lightning.models.critic import Critic
from egspo_lightning.models.fsdp import ShardingPlan, gathered
from egspo_lightning.models.policy import Policy
from egspo_lightning.types import NetworkOutputs


@dataclass(frozen=True, eq=False)
class Networks:
    """The networks of a run; log-probabilities and entropies are taken at the sampling temperature.

    ``reference`` is None where it is an adapter of the policy; ``critic`` where it is a head on the policy, or missing.
    """

    policy: Policy
    reference: Policy | None
    critic: Critic | None
    temperature: float
    has_reference: bool

    @property
    def trained(self) -> list[Policy | Critic]:
        """Policy and critic; the reference policy is frozen."""
        return [network for network in (self.policy, self.critic) if network is not None]

    def score(self, input_ids: Tensor, completion_mask: Tensor) -> NetworkOutputs:
        """Score sequences with all networks, at the sampling temperature."""
        current = self.policy(input_ids, completion_mask, self.temperature)
        values = current.values if self.critic is None else self.critic(input_ids, completion_mask)
        reference = self._reference_logprobs(input_ids, completion_mask)
        return NetworkOutputs(current.logprobs, current.entropies, values, reference)

    def _reference_logprobs(self, input_ids: Tensor, completion_mask: Tensor) -> Tensor | None:
        """Log-probabilities under the reference policy; None without one."""
        if not self.has_reference:
            return None
        with lora.as_reference(self.policy.lm) if self.reference is None else nullcontext():
            stats = (self.reference or self.policy)(input_ids, completion_mask, self.temperature, False)
        return stats.logprobs


class InferenceMode:
    """Puts networks into eval mode and gathers their shards; may be entered again within itself."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    @contextmanager
    def hold(
        self,
        networks: list[Any],
        precision: AbstractContextManager[Any],
        plan: ShardingPlan,
        *,
        whole: bool = True,
    ) -> Iterator[None]:
        """Hold networks whole and in eval mode, in the training precision; skip those that an outer call holds.

        With sharded networks, all ranks must enter together. ``whole=False`` leaves the shards as they are.
        """
        fresh = [network for network in networks if network not in self._held]
        was_training = [network.training for network in fresh]
        for network in fresh:
            network.eval()  # gradient checkpointing in train mode breaks the cache
        self._held += fresh if whole else []
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(precision)
                for network in fresh if whole else []:
                    stack.enter_context(gathered(network, plan))
                yield
        finally:
            for network, training in zip(fresh, was_training, strict=True):
                if whole:
                    self._held.remove(network)
                network.train(training)
