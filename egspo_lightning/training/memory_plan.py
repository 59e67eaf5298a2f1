"""How much memory a run needs on each device, from shapes alone: nothing is loaded, and nothing is computed.

Networks are built on the meta device, and the steps of a run (sampling, scoring, an update) are gone through with fake
tensors, which have shapes and no data, while the bytes of every tensor that lives are counted. So the counts are those
of the run's own forward and backward passes, at the greatest lengths that the config allows. What allocators, kernels'
workspaces and communication need on top is not in them.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from egspo_lightning.models.critic import Critic, CriticConfig
from egspo_lightning.models.policy import Policy
from egspo_lightning.models.policy_config import PolicyConfig
from egspo_lightning.ops.token_stats import token_stats_bytes
from egspo_lightning.rollout.token_sampling import TokenSampler
from egspo_lightning.rollout.transformers_engine import CompactCache
from egspo_lightning.training.optimizers import require_shardable
from egspo_lightning.types import Sampling


@dataclass(frozen=True)
class Workload:
    """What a device has to do.

    Args:
        policy: The model.
        critic: What estimates values; None has no critic.
        holds_reference: Whether a reference is held: a network or, with LoRA, an adapter.
        optimizer: Makes the optimizer from parameters.
        is_sharded: Whether weights, gradients and moments are spread over the devices.
        is_bfloat16: Whether products are computed in bfloat16.
        prompt_length: Longest prompt, tokens.
        completion_length: Longest completion, tokens.
        sampled_rows: Completions decoded at a time on a device.
        scored_tokens: Tokens scored at a time, where anything is scored; 0 where nothing is.
        update_rows: Rollouts in a micro-batch; where ``max_tokens`` is given, in an update.
        expert_rows: Demonstrations in the same in stage EGSPO.
        sft_rows: Demonstrations in the same in stage SFT.
        num_parts: Micro-batches an update.
        max_tokens: Tokens of a micro-batch at most; None leaves it to the number of its rows.
        looks_ahead: Whether a snapshot of the policy samples while it trains.
        cpu_offload: Whether the shards, their gradients and moments are in the host's memory.
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

    @property
    def length(self) -> int:
        """Of the longest sequence, tokens."""
        return self.prompt_length + self.completion_length

    @property
    def passes(self) -> list[tuple[int, int]]:
        """What goes through the networks in the larger kind of micro-batch: (rows, tokens of each)."""
        rows = max([self.update_rows, self.expert_rows], [self.sft_rows], key=sum)
        if self.max_tokens is None:
            return [(number, self.length) for number in rows if number]
        full, rest = divmod(min(self.max_tokens, sum(rows) * self.length), self.length)
        return [(number, length) for number, length in ((full, self.length), (1, rest)) if number and length]

    @property
    def trained_tokens(self) -> int:
        """Completion tokens that go through the output layer at a time in an update, at most.

        Within ``max_tokens`` they may be all but a few, those of short prompts.
        """
        most = max(self.update_rows, self.expert_rows, self.sft_rows) * self.completion_length
        return most if self.max_tokens is None else min(most, self.max_tokens)


class Memory(NamedTuple):
    """Bytes on one device, by part."""

    weights: int
    reference: int
    critic: int
    optimizer: int
    snapshot: int
    """a copy of what is trained, which samples meanwhile"""
    gradients: int
    """held over an update"""
    cache: int
    """keys and values of the completions that are decoded"""
    logits: int
    """decoding: logits, probabilities and what else a step of sampling takes"""
    gathered: int
    """whole weights, where they are sharded otherwise, while sampling and scoring"""
    activations: int
    """what the forward passes of a micro-batch leave for the backward pass"""
    output_layer: int
    """tiles of logits, and the gradient of the output layer, in an update"""
    update: int
    """what an update needs at most: activations, gradients and output layer, of which some go as others come"""
    scoring: int
    """what a scoring pass needs"""
    gathered_blocks: int
    """in an update, where weights are sharded: two blocks and what is outside blocks, and gradients of one and that"""
    host: int = 0
    """in the host's memory for this device, where shards are offloaded"""

    @property
    def held(self) -> int:
        """At all times."""
        return self.weights + self.reference + self.critic + self.optimizer + self.snapshot

    @property
    def phases(self) -> dict[str, int]:
        """Peak of each part of an iteration; with a snapshot the others go on beside the update."""
        sampling, scoring = self.cache + self.logits, self.scoring
        beside = max(sampling, scoring) if self.snapshot else 0
        return {
            "sampling": self.held + self.gathered + sampling,
            "scoring": self.held + self.gathered + scoring if scoring else 0,
            "update": self.held + self.gathered_blocks + self.update + beside,
        }

    @property
    def peak(self) -> int:
        """What a device must have."""
        return max(self.phases.values())


def plan(work: Workload, num_devices: int) -> Memory:
    """The memory of one device of ``num_devices``, bytes."""
    adapted, shards = work.policy.lora is not None, num_devices if work.is_sharded else 1
    policy, critic = _networks(work)
    weights, of_critic = _bytes(policy.parameters()), 0 if critic is None else _bytes(critic.parameters())
    reference = weights if work.holds_reference and not adapted else 0
    trained = [p for p in _parameters(policy, critic) if p.requires_grad]
    halves = 2 if work.is_bfloat16 and work.policy.dtype == "float32" else 1  # weights are gathered in bfloat16
    optimizer = work.optimizer(trained)
    if work.is_sharded:
        require_shardable(optimizer)
    spread = {  # over the devices
        "weights": weights // shards,
        "reference": reference // shards,
        "critic": of_critic // shards,
        "optimizer": _moments(optimizer, trained) // shards,
        "gradients": _bytes(trained) // shards,
    }
    on_device = {name: 0 if work.cpu_offload else size for name, size in spread.items()}
    held = on_device | {
        "host": sum(spread.values()) - sum(on_device.values()),
        "snapshot": _bytes(trained) if work.looks_ahead else 0,
        "gathered": (weights + reference + of_critic) // halves if work.is_sharded else 0,
        "gathered_blocks": _gathered_blocks(policy) // halves if work.is_sharded else 0,
    }
    _make_fake(work, policy, critic)
    with FakeTensorMode(allow_non_fake_inputs=True):
        cache, logits = _sampling(work, policy)
        scored = [(max(work.scored_tokens // work.length, 1), work.length)]
        scoring = _passes(work, policy, critic, scored, train=False)[1] if work.scored_tokens else 0
        activations, backward = _passes(work, policy, critic, work.passes, train=True)
    output_layer = token_stats_bytes(work.trained_tokens, policy.lm.get_output_embeddings().weight)
    gradients_before = held["gradients"] if work.num_parts > 1 else 0
    return Memory(
        **held,
        cache=cache,
        logits=logits,
        scoring=scoring,
        activations=activations,
        output_layer=output_layer,
        update=max(held["gradients"] + backward, gradients_before + activations + output_layer),
    )


def _networks(work: Workload) -> tuple[Policy, Critic | None]:
    """On the meta device."""
    own = work.critic is not None and work.critic.trunk == "own"
    with torch.device("meta"):
        policy = replace(work.policy, from_scratch=True).build(
            with_value_head=work.critic is not None and not own,
            with_reference=work.policy.lora is not None and work.holds_reference,
        )
        return policy, _critic(work) if own else None


def _make_fake(work: Workload, policy: Policy, critic: Critic | None) -> None:
    """Let networks of the meta device be fake ones of the CPU, whose kernels then decide what is kept for backward."""
    for network in (policy, critic):
        if network is not None:
            if work.is_sharded and work.is_bfloat16:
                network.to(torch.bfloat16)  # as blocks are gathered
            with FakeTensorMode(allow_non_fake_inputs=True):
                network.to_empty(device="cpu")
    policy.lm.tie_weights()


def _parameters(*networks: nn.Module | None) -> list[nn.Parameter]:
    return [parameter for network in networks if network is not None for parameter in network.parameters()]


def _critic(work: Workload) -> Critic:
    assert work.critic is not None
    config = work.critic.model or work.policy
    return Critic(replace(config, from_scratch=True).build().lm)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gathered_blocks(policy: Policy) -> int:
    """As ``sharding.shard`` cuts: a block and the next one, what is outside blocks, and gradients to be reduced."""
    names = set(getattr(policy.lm, "_no_split_modules", None) or ())
    blocks = [_bytes(module.parameters()) for module in policy.modules() if type(module).__name__ in names]
    root, block = _bytes(policy.parameters()) - sum(blocks), max(blocks, default=0)
    return 2 * root + 3 * block


def _moments(optimizer: Any, parameters: list[nn.Parameter]) -> int:
    """Bytes of its state after a step on meta tensors, whatever the optimizer.

    What parameters share, as the table of values that moments in 8 bits stand for, is there once.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    held = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    return _bytes({id(v): v for v in held}.values())


def _sampling(work: Workload, policy: Policy) -> tuple[int, int]:
    """Bytes of the cache, and of the last step of decoding beyond it."""
    rows, length = work.sampled_rows, work.length
    config = policy.lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = torch.bfloat16 if work.is_bfloat16 else policy.lm.dtype
    policy.eval()  # as the run does: gradient checkpointing in train mode has no cache
    with _Living(policy) as living, torch.no_grad(), _autocast(work):
        cache = CompactCache(config=policy.lm.config)
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.zeros(rows, heads, length - 1, size, dtype=dtype) for _ in range(2)), layer)
        held = living.now
        entries = policy.lm.get_output_embeddings().weight.shape[0]
        sampler = TokenSampler(rows, entries, Sampling(work.completion_length), torch.device("cpu"))
        logits = torch.zeros(rows, entries, dtype=dtype)  # of the step before, which live until these are there
        position = torch.full((rows, 1), length - 1)
        output = policy.lm(input_ids=position, position_ids=position, past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1]
        sampler.draw(logits, torch.zeros(rows), torch.arange(rows), torch.ones(rows, dtype=torch.bool))
    policy.train()
    return held, living.peak - held


def _passes(
    work: Workload, policy: Policy, critic: Critic | None, shapes: Sequence[tuple[int, int]], *, train: bool
) -> tuple[int, int]:
    """Bytes after forward passes over some shapes, and at most, with the backward pass through all where one trains.

    Gradients of parameters are not in them: of the peak as much is taken off as they are in the end.
    """
    networks = [policy.lm.get_decoder(), *([critic.trunk] if critic is not None else [])]
    trained = [p for p in _parameters(policy, critic) if p.requires_grad]
    before = 0
    with _Living(policy, critic) as living, torch.enable_grad() if train else torch.no_grad(), _autocast(work):
        if train and work.num_parts > 1:  # gradients of the micro-batches before
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            before = living.now
        ids = [torch.zeros(shape, dtype=torch.long) for shape in shapes]
        states = [network(input_ids=i, use_cache=False).last_hidden_state for network in networks for i in ids]
        kept = living.now - before
        if train:
            torch.autograd.backward(states, [torch.zeros_like(state) for state in states])
    held = _bytes(p.grad for p in trained if p.grad is not None)
    return kept, max(living.peak - held, 0)


def _autocast(work: Workload) -> Any:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if work.is_bfloat16 else nullcontext()


class _Living(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it, as long as they live."""

    def __init__(self, *networks: nn.Module | None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for network in networks:
            for tensor in () if network is None else (*network.parameters(), *network.buffers()):
                self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
