"""The critic of GAE: a value head on the policy's trunk, or a network of its own."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from egspo_lightning.errors import UserError
from egspo_lightning.models.batched_forward import Sequences, TrunkPasses
from egspo_lightning.models.lora import is_reference
from egspo_lightning.models.packed_attention import trunk_of
from egspo_lightning.models.policy import Policy, ValueHead
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.types import NonNegativeInt, PositiveFloat


@dataclass(frozen=True)
class CriticConfig:
    """The critic's network and training.

    Args:
        trunk: shared is a value head on the policy's trunk, own a separate network. A separate network of the policy's
            architecture starts from the policy at the end of SFT.
        model: Model of a separate network, with the policy's tokenizer; null takes the policy's model.
        coefficient: c_v, the weight of the value loss, above 0. trainer.gradient_clip_val clips one norm over policy
            and critic.
        clip: Largest change of a value since sampling, in units of the return; null does not clip.
        warmup_steps: Optimizer steps at the start of stage EGSPO that train only the critic; with a shared trunk, only
            its head.
        learning_rate: Learning rate of the critic; null takes the policy's.
    """

    trunk: Literal["shared", "own"] = "shared"
    model: PolicyConfig | None = None
    coefficient: PositiveFloat = 0.5
    clip: PositiveFloat | None = 0.2
    warmup_steps: NonNegativeInt = 0
    learning_rate: PositiveFloat | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.trunk == "shared":
            raise UserError(
                "model.critic.model names a model, but model.critic.trunk is shared, which uses the policy's. Set "
                "trunk to own, or leave model out."
            )

    def build(self, policy: PolicyConfig) -> "Critic":
        """Build the separate network, where trunk is own.

        Raises:
            UserError: the model cannot be loaded.
        """
        try:
            return Critic((self.model or policy).build().lm)
        except UserError as error:
            raise UserError(str(error).replace("model.policy.", "model.critic.model.")) from error


class Critic(nn.Module):
    """A transformer with a value head: a causal language model without its output layer."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.trunk = trunk_of(lm)
        self.passes = TrunkPasses(lm)
        self.value_head = ValueHead(lm)

    def forward(self, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
        """Value of the state before each completion token, (B, T) float32, 0 where the mask is false."""
        (states,) = self.passes.states(self.trunk, [Sequences(input_ids, completion_mask)])
        values: Tensor = self.value_head(states, completion_mask)
        return values

    def require_fit(self, policy: Policy) -> None:
        """Refuse a trunk whose vocabulary is smaller than the policy's.

        Raises:
            UserError: naming both sizes.
        """
        least, size = (trunk.config.get_text_config().vocab_size for trunk in (policy.lm, self.trunk))
        if size < least:
            raise UserError(
                f"model.critic.model has {size} vocabulary entries, and the policy's tokens need {least}. Choose a "
                "model with the policy's tokenizer."
            )

    def start_from(self, policy: Policy) -> None:
        """Copy the weights of the policy's trunk, if the architectures are the same."""
        theirs = {name: value for name, value in policy.trunk.named_parameters() if not is_reference(name)}
        ours = dict(self.trunk.named_parameters())
        if {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}:
            for name, value in ours.items():
                value.data.copy_(theirs[name].data)
