"""LoRA by peft: low-rank adapters on the frozen model, which without them is the reference, or with a second one.

    W x  ->  W x + (alpha / r) B A x        A: (r, in), B: (out, r), B = 0 at first

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3. The reference is the
policy as stage EGSPO begins: after SFT the same model with the adapter that it had then, kept beside the one in
training; without SFT, where B A = 0, the model alone. So no second copy of the model is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from egspo_lightning.errors import UserError, require

ADAPTER, REFERENCE = "default", "reference"


@dataclass(frozen=True)
class LoraConfig:
    """Trains adapters in place of the model; needs ``pip install "egspo-lightning[lora]"``.

    Args:
        rank: r, the rank of an adapter.
        alpha: The adapter's output is multiplied by alpha / r.
        target_modules: Names of the linear layers to adapt, such as [q_proj, v_proj]; by default all but the output
            layer.
        rank_stabilized: Multiply by alpha / sqrt(r) instead (rsLoRA).
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] | None = None
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        require(self.rank >= 1, "model.policy.lora.rank", self.rank, "at least 1")
        require(0 < self.alpha < math.inf, "model.policy.lora.alpha", self.alpha, "above 0")

    def inject(self, lm: Any, *, with_reference: bool = False) -> None:
        """Freeze the model and put trainable adapters on it, in float32, and a frozen one as the reference.

        Raises:
            UserError: peft is not installed, or no layer has such a name, or the output layer has.
        """
        try:
            from peft import LoraConfig as PeftConfig
            from peft import inject_adapter_in_model
        except ImportError as error:
            raise UserError('model.policy.lora needs peft: pip install "egspo-lightning[lora]".') from error
        config = PeftConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
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
    """Whether a parameter's name is that of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def is_reference(name: str) -> bool:
    """Whether a parameter's name is that of the reference's adapter."""
    return is_adapter(name) and f".{REFERENCE}." in name


def has_reference(lm: nn.Module) -> bool:
    """Whether a model carries an adapter as the reference."""
    return any(is_reference(name) for name, _ in lm.named_parameters())


@contextmanager
def as_reference(lm: nn.Module) -> Iterator[None]:
    """The model is the reference for a while: with the reference's adapter or, where there is none, without any."""
    assert _layers(lm), "a model without adapters cannot be its own reference"
    _activate(lm, REFERENCE if has_reference(lm) else None)
    try:
        yield
    finally:
        _activate(lm, ADAPTER)


def changes_nothing(lm: nn.Module) -> bool:
    """Whether the trained adapter gives exactly 0, as it does at first; of a sharded one, this rank's share."""
    ups = [p for name, p in lm.named_parameters() if ".lora_B." in name and not is_reference(name)]
    own = [up.to_local() if isinstance(up, DTensor) else up for up in ups]
    return not any(bool(up.any()) for up in own)


@torch.no_grad()
def copy_to_reference(lm: nn.Module) -> None:
    """Let the reference's adapter be what the trained one is now."""
    parameters = dict(lm.named_parameters())
    for name, frozen in parameters.items():
        if is_reference(name):
            frozen.copy_(parameters[trained_name(name)])


def trained_name(name: str) -> str:
    """Of the reference's parameter, that of the one in training."""
    return name.replace(f".{REFERENCE}.", f".{ADAPTER}.")


def merged(lm: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names of the plain model, W + (alpha / r) B A, as transformers saves and loads them.

    Args:
        lm: the model, which says where adapters are
        weights: its state dict, whole; as it is where there are no adapters
    """
    plain = {name.replace(".base_layer.", "."): value for name, value in weights.items() if not is_adapter(name)}
    for name, layer in _layers(lm):
        down, up = (weights[f"{name}.{part}.{ADAPTER}.weight"].float() for part in ("lora_A", "lora_B"))
        delta = layer.scaling[ADAPTER] * (up @ down)
        base = plain[f"{name}.weight"]
        plain[f"{name}.weight"] = (base.float() + (delta.T if layer.fan_in_fan_out else delta)).to(base.dtype)
    return plain


def _activate(lm: nn.Module, adapter: str | None) -> None:
    """Compute with an adapter, or with none.

    peft's own ``set_adapter`` and ``enable_adapters`` also switch gradients, which sharded parameters do not survive.
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
