"""Policy, reference and critic, as rollouts and updates ask them together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from egspo_lightning.models import lora
from egspo_lightning.models.critic import Critic
from egspo_lightning.models.policy import Policy, Sequences
from egspo_lightning.types import NetworkOutputs, Scores


@dataclass(frozen=True, eq=False)
class Networks:
    """What a run computes with.

    Args:
        policy: The policy.
        reference: The policy as stage EGSPO began, where it is a network of its own.
        critic: What estimates values, where it is a network of its own; it may be a head on the policy instead.
        temperature: Sampling temperature, which log-probabilities and entropies are taken at.
        has_reference: Whether there is a reference; if not ``reference``, the policy's model with another adapter or
            with none.
    """

    policy: Policy
    reference: Policy | None
    critic: Critic | None
    temperature: float
    has_reference: bool

    def statistics(self, input_ids: Tensor, completion_mask: Tensor, *, with_entropies: bool = True) -> NetworkOutputs:
        """What policy and critic say of sequences, with gradient where it is on; entropies where they are asked for."""
        current = self.policy(input_ids, completion_mask, self.temperature, with_entropies)
        return self._with_values(current, input_ids, completion_mask)

    def statistics_beside(
        self, input_ids: Tensor, completion_mask: Tensor, others: Sequences, *, with_entropies: bool = True
    ) -> tuple[NetworkOutputs, NetworkOutputs]:
        """The same, and what the policy says of other sequences, which share the passes through the trunk."""
        own = Sequences(input_ids, completion_mask, self.temperature, with_entropies)
        current, of_others = self.policy.together(own, others)
        return self._with_values(current, input_ids, completion_mask), of_others

    def _with_values(self, current: NetworkOutputs, input_ids: Tensor, completion_mask: Tensor) -> NetworkOutputs:
        if self.critic is None:
            return current
        return current._replace(values=self.critic(input_ids, completion_mask))

    def score(self, input_ids: Tensor, completion_mask: Tensor) -> Scores:
        """What all of them say of sequences."""
        current = self.statistics(input_ids, completion_mask)
        reference = self._reference_logprobs(input_ids, completion_mask)
        return Scores(current.logprobs, current.entropies, reference, current.values)

    def _reference_logprobs(self, input_ids: Tensor, completion_mask: Tensor) -> Tensor | None:
        """Of the reference; None without one."""
        stats: NetworkOutputs
        if not self.has_reference:
            return None
        if self.reference is not None:
            stats = self.reference(input_ids, completion_mask, self.temperature, False)
            return stats.logprobs
        with lora.as_reference(self.policy.lm):
            stats = self.policy(input_ids, completion_mask, self.temperature, False)
        return stats.logprobs
