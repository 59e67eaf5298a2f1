"""LoRA by peft: low-rank adapters on the frozen model, with the reference policy in the same model.

    W x  ->  W x + (alpha / r) B A x        A: (r, in), B: (out, r), B = 0 at first

Source: arXiv 2106.09685, equation 3. peft also adapts embeddings, where A = 0 at first, and stacks of fused experts.

The reference policy is the policy at the start of stage EGSPO: the model with a frozen copy of the adapter.
`lora_merge` merges adapters into the model.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from egspo_lightning.errors import PASS_ERRORS, UserError
from egspo_lightning.types import PositiveFloat, PositiveInt

ADAPTER, REFERENCE = "default", "reference"
FACTOR = re.compile(rf"(?:^|\.)lora_(?:embedding_)?[AB]\.({ADAPTER}|{REFERENCE})(?:\.|$)")
"""Found in peft's names of the factors A and B; its group is the adapter's name."""
ZERO_FACTOR = re.compile(r"(?:^|\.)lora_(?:B|embedding_A)\.")
"""Found in the names of those factors that are 0 at first."""


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank adapters and freeze the model; needs ``pip install "egspo-lightning[lora]"``.

    Args:
        rank: r, the rank of an adapter.
        alpha: The adapter's output is multiplied by alpha / r.
        target_modules: Names of the linear and embedding layers to adapt, such as [q_proj, v_proj]; null adapts all
            linear layers but the output layer, and fused experts where peft knows the model.
        rank_stabilized: Multiply by alpha / sqrt(r) instead (rsLoRA).
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    target_modules: list[str] | None = None
    rank_stabilized: bool = False

    def inject(self, lm: Any, *, with_reference: bool = False) -> None:
        """Freeze the model and add trainable adapters in float32, and with a reference a frozen second set.

        Raises:
            UserError: peft is not installed, cannot adapt a layer, finds none of a name, or it is the output layer.
        """
        try:
            from peft import LoraConfig as PeftConfig
            from peft import inject_adapter_in_model
        except ImportError as error:
            raise UserError('model.policy.lora needs peft: pip install "egspo-lightning[lora]".') from error
        config = PeftConfig(
            r=int(self.rank),
            lora_alpha=float(self.alpha),  # type: ignore[arg-type]
            target_modules="all-linear" if self.target_modules is None else self.target_modules,
            use_rslora=self.rank_stabilized,
        )
        layers = {name: getattr(module, "weight", None) for name, module in lm.named_modules()}
        try:
            for name in [ADAPTER, *([REFERENCE] if with_reference else [])]:
                inject_adapter_in_model(config, lm, adapter_name=name)
        except PASS_ERRORS as error:
            matrices = {name.rpartition(".")[2] for name, weight in layers.items() if getattr(weight, "ndim", 0) == 2}
            raise UserError(
                f"model.policy.lora.target_modules: {str(error).splitlines()[0]} Layers with a weight matrix: "
                f"[{', '.join(sorted(matrices))}]."
            ) from error
        self._require_targets(lm, list(layers))
        _untie(lm)
        _activate(lm, ADAPTER)
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_(is_adapter(name) and not is_reference(name))
            if is_adapter(name):
                parameter.data = parameter.data.float()  # small steps are lost in half precision

    def _require_targets(self, lm: Any, known: list[str]) -> None:
        """Refuse the output layer, and names of which the model has no layer; peft maps some names to fused experts."""
        if isinstance(lm.get_output_embeddings(), _layer_type()):
            raise UserError(
                "model.policy.lora.target_modules names the output layer, which cannot be adapted here. Leave it out."
            )
        missing = [
            target
            for target in self.target_modules or []
            if not any(f".{name}".endswith(f".{target}") for name in known)
        ]
        if missing and not adapts_parameters(lm):
            raise UserError(f"model.policy.lora.target_modules: {type(lm).__name__} has no layers named {missing}.")


def is_adapter(name: str) -> bool:
    """Whether a parameter with this name belongs to an adapter."""
    return FACTOR.search(name) is not None


def is_reference(name: str) -> bool:
    """Whether a parameter with this name belongs to the reference policy's adapter."""
    found = FACTOR.search(name)
    return found is not None and found[1] == REFERENCE


def trained_name(name: str) -> str:
    """Name of the trained parameter that corresponds to a parameter of the reference's adapter."""
    return FACTOR.sub(lambda found: found[0].replace(f".{REFERENCE}", f".{ADAPTER}"), name)


def zero_factors(lm: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of the trained adapter that are 0 at first, by name."""
    factors = {name: parameter for name, parameter in lm.named_parameters() if ZERO_FACTOR.search(name)}
    return {name: factor for name, factor in factors.items() if is_adapter(name) and not is_reference(name)}


@contextmanager
def as_reference(lm: nn.Module) -> Iterator[None]:
    """Let the model compute as the reference policy: with the reference's adapter."""
    assert any(is_reference(name) for name, _ in lm.named_parameters()), "the model has no reference adapter"
    _activate(lm, REFERENCE)
    try:
        yield
    finally:
        _activate(lm, ADAPTER)


@torch.no_grad()
def copy_to_reference(lm: nn.Module) -> None:
    """Copy the trained adapter's weights into the reference policy's adapter."""
    parameters = dict(lm.named_parameters())
    for name, frozen in parameters.items():
        if is_reference(name):
            frozen.copy_(parameters[trained_name(name)])


def adapted_layers(lm: nn.Module) -> dict[str, Any]:
    """peft's layers with adapters, by name; one that adapts another parameter of a layer contains the first."""
    if not any(is_adapter(name) for name, _ in lm.named_parameters()):
        return {}
    return {name: module for name, module in lm.named_modules() if isinstance(module, _layer_type())}


def adapts_parameters(lm: nn.Module) -> bool:
    """Whether some adapters are of single parameters, such as stacks of fused experts."""
    return any(hasattr(layer, "parameter_name") for layer in adapted_layers(lm).values())


def _activate(lm: nn.Module, adapter: str) -> None:
    """Compute with an adapter. peft's ``set_adapter`` also switches gradients, which breaks sharded parameters."""
    for layer in adapted_layers(lm).values():
        layer._active_adapter = [adapter]


def _untie(lm: Any) -> None:
    """Declare the output layer independent of an adapted input embedding, whose adapter it does not have.

    In memory both share the frozen weights. Export and vLLM, which read the config, get the two that result.
    """
    head: Any = lm.get_output_embeddings()
    embedding: Any = lm.get_input_embeddings()
    if isinstance(embedding, _layer_type()) and embedding.weight is getattr(head, "weight", None):
        for config in (lm.config, lm.config.get_text_config()):
            config.tie_word_embeddings = False


def _layer_type() -> type[Any]:
    from peft.tuners.lora import LoraLayer

    return LoraLayer
