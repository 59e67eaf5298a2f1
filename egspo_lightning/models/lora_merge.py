"""Merge of LoRA adapters into the model, by peft's own code, and its trial before training."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from egspo_lightning.errors import PASS_ERRORS, UserError
from egspo_lightning.models.lora import ADAPTER, adapted_layers, is_adapter, is_reference, zero_factors


def merged(lm: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge adapters, if any, into a whole state dict, W + (alpha / r) B A, under the names of transformers.

    Sums are in float32, and rounded once to the type of W. The model's own parameters, which may be shards, are not
    read.
    """
    return dict(merging(lm, weights, weights.__getitem__))


def merging(lm: nn.Module, names: Iterable[str], get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield what ``merged`` returns, layer by layer.

    Args:
        lm: the model
        names: its parameters, in the order in which they are wanted
        get: gives the whole tensor of a parameter; called once for each that is needed, in the same order on all ranks
    """
    layers = _outer_layers(lm)
    parts = {name: [part for part, _ in layer.named_parameters()] for name, layer in layers.items()}
    owners = {f"{name}.{part}": name for name in layers for part in parts[name]}
    for name in names:
        owner = owners.get(name)
        if owner is None:
            yield _plain(name), get(name)
        elif owner in parts:
            own = {part: get(f"{owner}.{part}") for part in parts.pop(owner) if not is_reference(part)}
            for part, value in _merge(layers[owner], own).items():
                yield f"{owner}.{_plain(part)}", value


class _Merge(nn.Module):
    """Merges the adapters of a layer, and of those inside it, in place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> None:
        for part in adapted_layers(self).values():
            part.merge(adapter_names=[ADAPTER])
            part.merged_adapters.clear()  # its own weights have no adapter merged


@torch.no_grad()
def _merge(layer: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base layer's weights, merged, by their names in the layer.

    ``weights``, the base's and the adapter's, is emptied, so that gathered tensors are freed once they are copied.
    """
    exact, dtypes = {}, {name: value.dtype for name, value in weights.items()}
    for name, dtype in dtypes.items():
        exact[f"layer.{name}"] = weights.pop(name).to(torch.promote_types(dtype, torch.float32), copy=True)
    functional_call(_Merge(layer), exact, ())
    return {name: exact[f"layer.{name}"].to(dtype) for name, dtype in dtypes.items() if not is_adapter(name)}


def _outer_layers(lm: nn.Module) -> dict[str, Any]:
    """Layers with adapters that lie in no other such layer."""
    return {name: layer for name, layer in adapted_layers(lm).items() if not name.endswith(".base_layer")}


def _plain(name: str) -> str:
    """Name of a parameter without adapters."""
    return re.sub(r"(^|\.)(?:base_layer\.)+", r"\1", name)


# The trial


@torch.no_grad()
def require_mergeable(lm: Any) -> None:
    """Refuse new adapters that the model does not compute with as their merge does, in a trial with four tokens.

    Adapters get random values meanwhile. Each kind of layer must compute the same from merged weights. Layers that the
    model does not call may not change its output when they are merged: otherwise its code reads their weights past the
    adapters. Weights and random states stay as they are. Models on the meta device are not tried.

    Raises:
        UserError: naming the layers, and those that remain.
    """
    if next(lm.parameters()).is_meta:
        return
    was_training = lm.training
    lm.eval()  # without dropout
    try:
        with _random_adapters(lm):
            _Trial(lm).run()
    finally:
        lm.train(was_training)


@contextmanager
def _random_adapters(lm: nn.Module) -> Iterator[None]:
    """Give new adapters an output other than 0."""
    factors = list(zero_factors(lm).values())
    generator = torch.Generator(factors[0].device).manual_seed(0)
    for factor in factors:
        factor.normal_(0.0, 0.1, generator=generator)
    try:
        yield
    finally:
        for factor in factors:
            factor.zero_()


class _Trial:
    """Compares a model with adapters, layer by layer, with merged weights; one layer is merged at a time."""

    def __init__(self, lm: Any) -> None:
        self._lm, self._layers = lm, _outer_layers(lm)
        self._running: list[str] = []
        self._called: set[str] = set()
        self._compared: set[tuple[type, str]] = set()

    def run(self) -> None:
        """Pass four tokens through the model."""
        probe = {"input_ids": torch.arange(4, device=next(self._lm.parameters()).device)[None], "use_cache": False}
        hooks = [layer.register_forward_pre_hook(partial(self._enter, name)) for name, layer in self._layers.items()]
        for name, layer in self._layers.items():
            hooks.append(layer.register_forward_hook(partial(self._leave, name), with_kwargs=True))
        try:
            logits = self._lm(**probe).logits
        except UserError:
            raise
        except PASS_ERRORS as error:
            if self._running:  # without adapters, the policy names what fails
                self._refuse(self._running[-1], f"fail with {type(error).__name__}: {error}", error)
            return
        finally:
            for hook in hooks:
                hook.remove()
        self._try_uncalled(probe, logits)

    def _try_uncalled(self, probe: dict[str, Any], logits: Tensor) -> None:
        """Merge the layers that the pass did not call, such as experts without tokens, and expect the same logits."""
        idle = [name for name in self._layers if name not in self._called]
        for leaf in sorted({_leaf(name) for name in idle}):
            weights: dict[str, Tensor] = {}
            for name in (name for name in idle if _leaf(name) == leaf):
                weights |= {f"{name}.{part}": value for part, value in self._merge(name).items()}
            if not torch.allclose(functional_call(self._lm, weights, (), probe).logits, logits, equal_nan=True):
                self._refuse(leaf, "have no effect: the model reads the weights without calling the layer")

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Compare the first layer of each kind."""
        self._running.pop()
        self._called.add(name)
        parent = self._lm.get_submodule(name.rpartition(".")[0])
        if (kind := (type(parent), _leaf(name))) in self._compared:
            return
        self._compared.add(kind)
        base, weights = layer.get_base_layer(), {_plain(part): weight for part, weight in self._merge(name).items()}
        before, expected = base(*args, **kwargs), functional_call(base, weights, args, kwargs)
        if not _are_close(*map(_first_floats, (before, expected, output))):
            self._refuse(name, "compute something else than merged weights would")

    def _merge(self, name: str) -> dict[str, Tensor]:
        layer = self._layers[name]
        return _merge(layer, {part: p for part, p in layer.named_parameters() if not is_reference(part)})

    def _refuse(self, name: str, reason: str, cause: Exception | None = None) -> None:
        leaf = _leaf(name)
        others = {_leaf(name) for name, layer in self._layers.items() if not hasattr(layer, "parameter_name")} - {leaf}
        raise UserError(
            f"model.policy.lora.target_modules: in {type(self._lm).__name__}, adapters of {leaf!r} {reason}. Leave it "
            f"out; the other layers are [{', '.join(sorted(others))}]."
        ) from cause


def _are_close(before: Tensor, expected: Tensor, found: Tensor) -> bool:
    """Whether an adapted layer's output is that of merged weights, up to rounding in the model's type."""
    change, rounding = (expected - before).norm(), 16 * torch.finfo(before.dtype).eps * before.norm()
    return not (found - expected).norm() > 0.1 * change + rounding  # NaN passes: such steps are skipped and counted


def _first_floats(output: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
