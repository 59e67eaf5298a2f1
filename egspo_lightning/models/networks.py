"""Policy, reference policy and critic, scored together."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from egspo_lightning.models import lora
from egspo_lightning.models.critic import Critic
from egspo_lightning.models.policy import Policy
from egspo_lightning.types import NetworkOutputs


@dataclass(frozen=True, eq=False)
class Networks:
    """The networks of a run; log-probabilities and entropies are taken at the sampling temperature.

    ``reference`` is None where it is an adapter of the policy, or the policy without one; ``critic`` where it is a head
    on the policy, or missing.
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
