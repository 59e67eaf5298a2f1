"""The critic of GAE: a value head on the policy's trunk, or a network of its own."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from egspo_lightning.errors import UserError, require
from egspo_lightning.models.batched_forward import Passes, Sequences
from egspo_lightning.models.lora import is_reference
from egspo_lightning.models.packed_attention import use_packing
from egspo_lightning.models.policy import Policy, PolicyConfig, ValueHead


@dataclass(frozen=True)
class CriticConfig:
    """What estimates the values, and how it is trained.

    Args:
        trunk: shared is a value head on the policy's trunk, own a network apart. One of the policy's architecture
            starts from the policy at the end of SFT.
        model: Another model as the trunk of its own, with the policy's tokenizer; null takes the policy's.
        coefficient: c_v, the weight of the value loss, above 0. trainer.gradient_clip_val clips one norm over policy
            and critic.
        clip: Largest step of a value from where it was at sampling, in units of the return; null does not clip.
        warmup_steps: Optimizer steps at the start of stage EGSPO in which only the critic is trained; with a shared
            trunk, only its head.
        learning_rate: Of the critic; null is that of the policy.
    """

    trunk: Literal["shared", "own"] = "shared"
    model: PolicyConfig | None = None
    coefficient: float = 0.5
    clip: float | None = 0.2
    warmup_steps: int = 0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.trunk == "shared":
            raise UserError(
                "model.critic.model names a network, but model.critic.trunk is shared, which uses the policy's. Set "
                "trunk to own, or leave model out."
            )
        require(0 < self.coefficient < math.inf, "model.critic.coefficient", self.coefficient, "above 0")
        require(self.clip is None or 0 < self.clip < math.inf, "model.critic.clip", self.clip, "above 0, or null")
        require(self.warmup_steps >= 0, "model.critic.warmup_steps", self.warmup_steps, "at least 0")
        rate = self.learning_rate
        require(rate is None or 0 < rate < math.inf, "model.critic.learning_rate", rate, "above 0, or null")

    def build(self, policy: PolicyConfig) -> "Critic | None":
        """The network of its own, or None where it is a head on the policy's trunk.

        Raises:
            UserError: the model cannot be loaded.
        """
        if self.trunk == "shared":
            return None
        if self.model is None:
            return Critic(policy.build().lm)
        try:
            return Critic(self.model.build().lm)
        except UserError as error:
            raise UserError(str(error).replace("model.policy.", "model.critic.model.")) from error


class Critic(nn.Module):
    """A transformer with a value head.

    Args:
        lm: a causal language model, of which the output layer is dropped
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.trunk = lm.get_decoder()
        self.passes = Passes(use_packing(lm))
        self.value_head = ValueHead(lm)

    def forward(self, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
        """Value of the state before each completion token, (B, T) float32, 0 where the mask is false."""
        (states,) = self.passes.states(self.trunk, [Sequences(input_ids, completion_mask)])
        values: Tensor = self.value_head(states, completion_mask)
        return values

    def require_fit(self, policy: Policy) -> None:
        """Refuse a trunk that cannot read what the policy writes.

        Raises:
            UserError: its vocabulary is smaller.
        """
        least, size = (trunk.config.get_text_config().vocab_size for trunk in (policy.lm, self.trunk))
        if size < least:
            raise UserError(
                f"model.critic.model has {size} vocabulary entries, and the policy's tokens need {least}. Choose a "
                "model with the policy's tokenizer."
            )

    def start_from(self, policy: Policy) -> None:
        """Take the weights of the policy's trunk, where the architectures are the same."""
        parameters = policy.lm.get_decoder().named_parameters()
        theirs = {name: value for name, value in parameters if not is_reference(name)}
        ours = dict(self.trunk.named_parameters())
        if {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}:
            for name, value in ours.items():
                value.data.copy_(theirs[name].data)
