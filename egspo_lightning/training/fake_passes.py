"""Fake passes: memory of decoding, forward and backward passes, counted with tensors that have shapes and no data."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from egspo_lightning.errors import PASS_ERRORS, UserError
from egspo_lightning.models.critic import Critic
from egspo_lightning.models.policy import Policy
from egspo_lightning.rollout.token_sampling import TokenSampler
from egspo_lightning.rollout.transformers_engine import CompactCache
from egspo_lightning.types import Sampling


class FakePasses:
    """Passes of fake tensors through networks of the meta device.

    The networks become fake ones on the CPU, whose kernels decide what is kept for the backward pass.

    Args:
        policy: on the meta device
        critic: separate network of the critic, on the meta device
        is_bfloat16: whether products are computed in bfloat16
        is_sharded: whether weights are sharded, and gathered in the type of the products
    """

    def __init__(self, policy: Policy, critic: Critic | None, *, is_bfloat16: bool, is_sharded: bool) -> None:
        self._policy, self._is_bfloat16 = policy, is_bfloat16
        self._networks: list[Policy | Critic] = [policy] if critic is None else [policy, critic]
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        for network in self._networks:
            if is_sharded and is_bfloat16:
                network.to(torch.bfloat16)
            # A separate mode: the passes then count weights that they use once more, and estimates are a few percent
            # above measured peaks instead of below.
            with FakeTensorMode(allow_non_fake_inputs=True):
                network.to_empty(device="cpu")
        policy.lm.tie_weights()

    def decoding(self, rows: int, length: int, completion_length: int) -> tuple[int, int]:
        """Bytes of the cache of keys and values, and of the last step of decoding beyond it.

        ``rows`` completions are decoded at a time; ``length`` is that of prompt and completion, in tokens.

        Raises:
            UserError: the model has no plain cache of keys and values.
        """
        try:
            return self._decoding(rows, length, completion_length)
        except PASS_ERRORS as error:
            raise UserError(
                f"plan counts the memory of caches of keys and values. Models of type "
                f"{self._policy.lm.config.model_type!r} keep something else. Leave out plan, and try a short run."
            ) from error

    def _decoding(self, rows: int, length: int, completion_length: int) -> tuple[int, int]:
        lm = self._policy.lm
        config = lm.config.get_text_config()
        heads = num_key_value_heads(config)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = torch.bfloat16 if self._is_bfloat16 else lm.dtype
        self._policy.eval()  # as in a run: with gradient checkpointing, train mode has no cache
        with self._counting(grad=False) as living:
            cache = CompactCache(config=lm.config)
            for layer in range(config.num_hidden_layers):
                cache.update(*(torch.zeros(rows, heads, length - 1, size, dtype=dtype) for _ in range(2)), layer)
            held = living.now
            entries = lm.get_output_embeddings().weight.shape[0]
            sampler = TokenSampler(rows, entries, Sampling(completion_length), torch.device("cpu"))
            logits = torch.zeros(rows, entries, dtype=dtype)  # of the step before, alive until the next are computed
            position = torch.full((rows, 1), length - 1)
            output = lm(input_ids=position, position_ids=position, past_key_values=cache, use_cache=True)
            logits = output.logits[:, -1]
            sampler.draw(logits, torch.zeros(rows), torch.arange(rows), torch.ones(rows, dtype=torch.bool))
        self._policy.train()
        return held, living.peak - held

    def scoring(self, rows: int, length: int) -> int:
        """Peak bytes of a forward pass of all networks without gradient."""
        with self._counting(grad=False) as living:
            _states = self._forward(torch.zeros(rows, length, dtype=torch.long))
        return living.peak

    def training(self, rows: int, length: int, *, accumulates: bool) -> tuple[int, int]:
        """Bytes that a forward pass keeps for the backward pass, and the peak of both without parameters' gradients.

        All rows of a micro-batch share the pass: a second one would hold all gradients once more, until autograd adds
        those of both. ``accumulates`` says whether gradients of earlier micro-batches are held.
        """
        trained = [p for network in self._networks for p in network.parameters() if p.requires_grad]
        before = 0
        with self._counting(grad=True) as living:
            if accumulates:
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
                before = living.now
            states = self._forward(torch.zeros(rows, length, dtype=torch.long))
            kept = living.now - before
            torch.autograd.backward(states, [torch.zeros_like(state) for state in states])
        return kept, max(living.peak - tensor_bytes(p.grad for p in trained if p.grad is not None), 0)

    def _forward(self, ids: Tensor) -> list[Tensor]:
        return [network.trunk(input_ids=ids, use_cache=False).last_hidden_state for network in self._networks]

    @contextmanager
    def _counting(self, *, grad: bool) -> Iterator["_LiveBytes"]:
        autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if self._is_bfloat16 else nullcontext()
        with self._mode, _LiveBytes(self._networks) as living, torch.set_grad_enabled(grad), autocast:
            yield living


def num_key_value_heads(config: Any) -> int:
    """Number of heads of keys and values in the text config of a model."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it, as long as they live; weights of networks do not count."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for network in networks:
            for tensor in (*network.parameters(), *network.buffers()):
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
