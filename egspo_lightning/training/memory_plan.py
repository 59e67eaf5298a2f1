"""Memory planner: estimates the memory that a run needs on each device, from shapes alone.

Decoding, scoring and an optimizer step go through networks on the meta device with fake tensors (`fake_passes`), at the
greatest lengths that the config allows. Allocators, kernels' workspaces and communication need memory on top.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from egspo_lightning.models.critic import Critic, CriticConfig
from egspo_lightning.models.policy import Policy
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.token_stats import token_stats_bytes
from egspo_lightning.rollout.engine import Reservation, ReservingEngine
from egspo_lightning.training.fake_passes import FakePasses, num_key_value_heads, tensor_bytes
from egspo_lightning.training.optimizers import require_shardable


@dataclass(frozen=True)
class Workload:
    """The work of one device.

    Args:
        holds_reference: Whether a reference policy is held: a network or, with LoRA, an adapter.
        optimizer: Makes the optimizer from parameters.
        is_sharded: Whether weights, gradients and the optimizer's state are sharded over the devices.
        is_bfloat16: Whether products are computed in bfloat16.
        prompt_length, completion_length: Longest prompt and completion, tokens.
        sampled_rows: Completions decoded at a time on a device.
        scored_tokens: Tokens scored at a time; 0 without a scoring pass.
        update_rows: Rollouts in a micro-batch or, with ``max_tokens``, in an optimizer step.
        expert_rows, sft_rows: Demonstrations in the same in stages EGSPO and SFT.
        num_parts: Micro-batches of an optimizer step.
        looks_ahead: Whether a snapshot of the policy samples while it trains.
        max_tokens: Most tokens of a micro-batch; None bounds the number of its rows instead.
        cpu_offload: Whether shards, their gradients and optimizer states are in the host's memory.
        engine: Samples with weights and a cache of its own; None samples with the policy itself.
        device_bytes: Memory of the device, of which such an engine takes a share.
    """

    policy: PolicyConfig
    critic: CriticConfig | None
    holds_reference: bool
    optimizer: Callable[[Iterable[nn.Parameter]], Any]
    is_sharded: bool
    is_bfloat16: bool
    prompt_length: int
    completion_length: int
    sampled_rows: int
    scored_tokens: int
    update_rows: int
    expert_rows: int
    sft_rows: int
    num_parts: int
    looks_ahead: bool = False
    max_tokens: int | None = None
    cpu_offload: bool = False
    engine: ReservingEngine | None = None
    device_bytes: int = 0

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_length + self.completion_length

    @property
    def rows(self) -> tuple[int, int]:
        """Number of rows, and tokens of each, in the pass of the larger kind of micro-batch: rows share one pass."""
        number = max(self.update_rows + self.expert_rows, self.sft_rows)
        if self.max_tokens is None:
            return number, self.length
        tokens = min(self.max_tokens, number * self.length)
        number = -(-tokens // self.length)
        return number, -(-tokens // number)

    @property
    def trained_tokens(self) -> int:
        """Most completion tokens that go through the output layer at a time in training, were prompts short."""
        most = max(self.update_rows, self.expert_rows, self.sft_rows) * self.completion_length
        return most if self.max_tokens is None else min(most, self.max_tokens)


class Memory(NamedTuple):
    """Bytes on one device, by part."""

    weights: int
    reference: int
    critic: int
    optimizer: int
    snapshot: int
    """a copy of the trained networks, which samples while they train"""
    gradients: int
    """held over an optimizer step"""
    engine_weights: int
    """weights of an engine that samples with a copy"""
    cache: int
    """keys and values of the completions that are decoded, or room for them in such an engine"""
    logits: int
    """decoding: logits, probabilities and the rest of a sampling step"""
    gathered: int
    """sampling and scoring: whole weights, if they are sharded otherwise"""
    copied: int
    """sampling with such an engine, instead: the largest weight, if they are sharded otherwise"""
    activations: int
    """kept by the forward passes of a micro-batch for the backward pass"""
    output_layer: int
    """training: tiles of logits, and the gradient of the output layer"""
    update: int
    """peak of an optimizer step: activations, gradients and output layer, which do not all live at once"""
    scoring: int
    """peak of a scoring pass"""
    gathered_blocks: int
    """training with sharded weights: two blocks and all outside blocks, and gradients of one block and the rest"""
    host: int = 0
    """in the host's memory for this device, if shards are offloaded"""
    engine_stays: int = 0
    """what such an engine holds while it does not sample"""
    completion_cache: int = 0
    """keys and values of one completion of the greatest length in such an engine, the part on this device"""

    @property
    def held(self) -> int:
        """Bytes held at all times."""
        return self.weights + self.reference + self.critic + self.optimizer + self.snapshot

    @property
    def phases(self) -> dict[str, int]:
        """Peak of each part of an iteration; a snapshot samples and scores during the update."""
        sampling, scoring = self.engine_weights + self.cache + self.logits, self.scoring
        beside = max(sampling, scoring + self.engine_stays) if self.snapshot else self.engine_stays
        whole = self.copied if self.engine_weights else self.gathered
        return {
            "sampling": self.held + whole + sampling,
            "scoring": self.held + self.gathered + scoring + self.engine_stays if scoring else 0,
            "update": self.held + self.gathered_blocks + self.update + beside,
        }

    @property
    def peak(self) -> int:
        """Memory that a device must have."""
        return max(self.phases.values())


def plan(work: Workload, num_devices: int) -> Memory:
    """The memory of one device of ``num_devices``, bytes.

    Raises:
        UserError: the model cannot be built, or the optimizer cannot step sharded weights.
    """
    policy, critic = _networks(work)
    held = _held(work, policy, critic, num_devices)
    engine = _reserved(work, policy)
    passes = FakePasses(policy, critic, is_bfloat16=work.is_bfloat16, is_sharded=work.is_sharded)
    cache, logits = passes.decoding(1 if engine else work.sampled_rows, work.length, work.completion_length)
    scoring = passes.scoring(max(work.scored_tokens // work.length, 1), work.length) if work.scored_tokens else 0
    activations, backward = passes.training(*work.rows, accumulates=work.num_parts > 1)
    output_layer = token_stats_bytes(work.trained_tokens, policy.lm.get_output_embeddings().weight)
    before = activations + output_layer + (held["gradients"] if work.num_parts > 1 else 0)
    sampling = {"engine_weights": 0, "cache": cache, "logits": logits}
    if engine is not None:
        sampling = {"engine_weights": engine.weights, "cache": engine.cache, "logits": 0}
        sampling["completion_cache"] = _completion_cache(cache, engine, work, policy)
        sampling["engine_stays"] = engine.weights + engine.cache if engine.stays else 0
    return Memory(
        **held,
        **sampling,
        scoring=scoring,
        activations=activations,
        output_layer=output_layer,
        update=max(held["gradients"] + backward, before),
    )


def _reserved(work: Workload, policy: Policy) -> Reservation | None:
    """The memory of an engine with weights and a cache of its own."""
    if work.engine is None:
        return None
    num_parameters = sum(parameter.numel() for parameter in policy.lm.parameters())
    return work.engine.reservation(num_parameters, _compute_dtype(work, policy), work.device_bytes)


def _completion_cache(cache: int, engine: Reservation, work: Workload, policy: Policy) -> int:
    """Bytes on a device of a completion in the engine's cache, from those in the type in which the policy computes.

    Devices share the heads of keys and values; if there are fewer heads, some devices hold the same one.
    """
    num_parts = min(engine.num_devices, num_key_value_heads(policy.lm.config.get_text_config()))
    return -(-cache * engine.itemsize // (_compute_dtype(work, policy).itemsize * num_parts))


def _compute_dtype(work: Workload, policy: Policy) -> torch.dtype:
    dtype: torch.dtype = torch.bfloat16 if work.is_bfloat16 else policy.lm.dtype
    return dtype


def _networks(work: Workload) -> tuple[Policy, Critic | None]:
    """Policy and separate critic on the meta device."""
    config, critic = replace(work.policy, from_scratch=True), work.critic
    with torch.device("meta"):
        policy = config.build(
            with_value_head=critic is not None and critic.trunk == "shared",
            with_reference=config.lora is not None and work.holds_reference,
        )
        if critic is None or critic.trunk == "shared":
            return policy, None
        model = None if critic.model is None else replace(critic.model, from_scratch=True)
        return policy, replace(critic, model=model).build(config)


def _held(work: Workload, policy: Policy, critic: Critic | None, num_devices: int) -> dict[str, int]:
    """Bytes that do not depend on the batches, by the names of ``Memory``."""
    parameters = [*policy.parameters(), *(() if critic is None else critic.parameters())]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights, all_weights = tensor_bytes(policy.parameters()), tensor_bytes(parameters)
    reference = weights if work.holds_reference and work.policy.lora is None else 0
    optimizer = work.optimizer(trained)
    if work.is_sharded:
        require_shardable(optimizer)
    sharded = {
        "weights": weights,
        "reference": reference,
        "critic": all_weights - weights,
        "optimizer": _optimizer_bytes(optimizer, trained),
        "gradients": tensor_bytes(trained),
    }
    sharded = {name: size // (num_devices if work.is_sharded else 1) for name, size in sharded.items()}
    on_device = {name: 0 if work.cpu_offload else size for name, size in sharded.items()}
    halves = 2 if work.is_bfloat16 and work.policy.dtype == "float32" else 1  # weights are gathered in bfloat16
    return on_device | {
        "host": sum(sharded.values()) - sum(on_device.values()),
        "snapshot": tensor_bytes(trained) if work.looks_ahead else 0,
        "gathered": (all_weights + reference) // halves if work.is_sharded else 0,
        "copied": _largest(policy) if work.is_sharded and work.engine is not None else 0,
        "gathered_blocks": _gathered_blocks(policy) // halves if work.is_sharded else 0,
    }


def _gathered_blocks(policy: Policy) -> int:
    """Bytes under ``fsdp.shard``: two blocks and all outside blocks, and gradients of one block and the rest."""
    names = set(getattr(policy.lm, "_no_split_modules", None) or ())
    blocks = [tensor_bytes(module.parameters()) for module in policy.modules() if type(module).__name__ in names]
    root, block = tensor_bytes(policy.parameters()) - sum(blocks), max(blocks, default=0)
    return 2 * root + 3 * block


def _largest(policy: Policy) -> int:
    """Bytes of the largest parameter."""
    return max(tensor_bytes([parameter]) for parameter in policy.lm.parameters())


def _optimizer_bytes(optimizer: Any, parameters: Sequence[nn.Parameter]) -> int:
    """Bytes of its state after a step on meta tensors; shared ones, as of moments in 8 bits, count once."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    return tensor_bytes({id(v): v for v in tensors}.values())
