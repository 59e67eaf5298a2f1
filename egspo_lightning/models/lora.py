"""LoRA by peft: low-rank adapters on the frozen model, with the reference policy in the same model.

    W x  ->  W x + (alpha / r) B A x        A: (r, in), B: (out, r), B = 0 at first

Source: arXiv 2106.09685, equation 3. The reference policy is the policy at the start of stage EGSPO. After SFT it is
the model with a frozen copy of the adapter; without SFT, where B A = 0, it is the model without adapters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from egspo_lightning.errors import UserError
from egspo_lightning.types import PositiveFloat, PositiveInt

ADAPTER, REFERENCE = "default", "reference"


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank adapters and freeze the model; needs ``pip install "egspo-lightning[lora]"``.

    Args:
        rank: r, the rank of an adapter.
        alpha: The adapter's output is multiplied by alpha / r.
        target_modules: Names of the linear layers to adapt, such as [q_proj, v_proj]; null adapts all but the output
            layer.
        rank_stabilized: Multiply by alpha / sqrt(r) instead (rsLoRA).
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    target_modules: list[str] | None = None
    rank_stabilized: bool = False

    def inject(self, lm: Any, *, with_reference: bool = False) -> None:
        """Freeze the model and add trainable adapters in float32, and with a reference a frozen second set.

        Raises:
            UserError: peft is not installed, no layer has such a name, or a name is that of the output layer.
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
        try:
            for name in [ADAPTER, *([REFERENCE] if with_reference else [])]:
                inject_adapter_in_model(config, lm, adapter_name=name)
        except ValueError as error:
            raise UserError(f"model.policy.lora.target_modules: {str(error).splitlines()[0]}") from error
        if isinstance(lm.get_output_embeddings(), _layer_type()):
            raise UserError("model.policy.lora.target_modules names the output layer, which cannot be adapted here.")
        _activate(lm, ADAPTER)
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_(is_adapter(name) and not is_reference(name))
            if is_adapter(name):
                parameter.data = parameter.data.float()  # small steps are lost in half precision


def is_adapter(name: str) -> bool:
    """Whether a parameter with this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def is_reference(name: str) -> bool:
    """Whether a parameter with this name belongs to the reference policy's adapter."""
    return is_adapter(name) and f".{REFERENCE}." in name


@contextmanager
def as_reference(lm: nn.Module) -> Iterator[None]:
    """Let the model compute as the reference policy: with the reference's adapter if it has one, else without any."""
    assert _layers(lm), "a model without adapters cannot be its own reference"
    has_reference = any(is_reference(name) for name, _ in lm.named_parameters())
    _activate(lm, REFERENCE if has_reference else None)
    try:
        yield
    finally:
        _activate(lm, ADAPTER)


def changes_nothing(lm: nn.Module) -> bool:
    """Whether the trained adapter's output is exactly 0, as at initialization; looks at this rank's shard only."""
    ups = [p for name, p in lm.named_parameters() if ".lora_B." in name and not is_reference(name)]
    own = [up.to_local() if isinstance(up, DTensor) else up for up in ups]
    return not any(bool(up.any()) for up in own)


@torch.no_grad()
def copy_to_reference(lm: nn.Module) -> None:
    """Copy the trained adapter's weights into the reference policy's adapter."""
    parameters = dict(lm.named_parameters())
    for name, frozen in parameters.items():
        if is_reference(name):
            frozen.copy_(parameters[trained_name(name)])


def trained_name(name: str) -> str:
    """Name of the trained parameter that corresponds to a parameter of the reference's adapter."""
    return name.replace(f".{REFERENCE}.", f".{ADAPTER}.")


def merged(lm: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge adapters, if any, into a whole state dict, W + (alpha / r) B A, under the names of transformers."""
    plain = {name.replace(".base_layer.", "."): value for name, value in weights.items() if not is_adapter(name)}
    for name, layer in _layers(lm):
        down, up = (weights[f"{name}.{part}.{ADAPTER}.weight"].float() for part in ("lora_A", "lora_B"))
        delta = layer.scaling[ADAPTER] * (up @ down)
        base = plain[f"{name}.weight"]
        plain[f"{name}.weight"] = (base.float() + (delta.T if layer.fan_in_fan_out else delta)).to(base.dtype)
    return plain


def _activate(lm: nn.Module, adapter: str | None) -> None:
    """Compute with an adapter, or with none.

    peft's ``set_adapter`` and ``enable_adapters`` also switch gradients, which breaks sharded parameters.
    """
    for _, layer in _layers(lm):
        layer._disable_adapters = adapter is None
        layer._active_adapter = [adapter or ADAPTER]


def _layers(lm: nn.Module) -> list[tuple[str, Any]]:
    if not any(is_adapter(name) for name, _ in lm.named_parameters()):
        return []
    return [(name, module) for name, module in lm.named_modules() if isinstance(module, _layer_type())]


def _layer_type() -> type:
    from peft.tuners.lora import LoraLayer

    return LoraLayer
