"""The policy: any causal language model of transformers, with its tokenizer, seen as per-token statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from egspo_lightning.errors import UserError
from egspo_lightning.models.batched_forward import Passes, Sequences
from egspo_lightning.models.lora import LoraConfig
from egspo_lightning.models.packed_attention import use_packing
from egspo_lightning.ops.token_stats import token_stats
from egspo_lightning.types import NetworkOutputs

LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises for a name, folder or file that it cannot make a model of."""


@dataclass(frozen=True)
class PolicyConfig:
    """Which model to train.

    Args:
        name_or_path: Name on the Hugging Face hub, or a local folder with config.json and the tokenizer.
        from_scratch: Random weights from the config alone; the folder then needs no weights.
        dtype: Type of the weights. Prefer float32 weights with --trainer.precision bf16-mixed.
        attn_implementation: sdpa, eager, flash_attention_2 ...; transformers' own choice by default.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        trust_remote_code: Run Python code that comes with the model.
        revision: Branch, tag or commit on the hub.
        lora: Train low-rank adapters, and the model itself not; null trains the model.
    """

    name_or_path: str
    from_scratch: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    revision: str = "main"
    lora: LoraConfig | None = None

    def load_tokenizer(self) -> Any:
        """The tokenizer, checked to have an EOS, and with a padding token.

        Raises:
            UserError: it cannot be loaded or has no EOS token.
        """
        tokenizer = self._load(AutoTokenizer, "tokenizer")
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model.policy.name_or_path: the tokenizer of {self.name_or_path!r} has no EOS token, so no "
                'completion could end. Set "eos_token" in its tokenizer_config.json.'
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def build(self, *, with_value_head: bool = False, with_reference: bool = False) -> Policy:
        """The model, in train mode, without dropout; where asked for with a value head, and a reference's adapter.

        Raises:
            UserError: it cannot be loaded, or its output layer is more than a linear map of the last hidden state.
        """
        dtype = getattr(torch, self.dtype)
        attention = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        if self.from_scratch:
            config = self._load(AutoConfig, "config")
            trust = {"trust_remote_code": self.trust_remote_code}
            with self._told("architecture"):
                lm = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention, **trust)
        else:
            told = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # refused below, by name and shape
            lm, info = self._load(AutoModelForCausalLM, "weights", dtype=dtype, **attention, **told)
            self._require_whole(info)
        if self.gradient_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.lora is not None:
            self.lora.inject(lm, with_reference=with_reference)
        return Policy(lm, ValueHead(lm) if with_value_head else None)

    def require_vocabulary(self, tokenizer: Any) -> None:
        """Refuse a model that has no row for some of the tokenizer's ids.

        Raises:
            UserError: naming both sizes.
        """
        size = self._load(AutoConfig, "config").get_text_config().vocab_size
        most = max(tokenizer.get_vocab().values(), default=-1)
        if most >= size:
            raise UserError(
                f"model.policy.name_or_path: the tokenizer of {self.name_or_path!r} gives ids up to {most}, and "
                f"vocab_size in its config.json is {size}. Take the tokenizer and the weights of the same model."
            )

    def _require_whole(self, info: dict[str, Any]) -> None:
        """Refuse weights that transformers would make up: a part of the policy would silently be noise."""
        told = [
            f"{name} has the shape {tuple(has)}, by config.json {tuple(needs)}"
            for name, has, needs in info["mismatched_keys"]
        ]
        told += [f"{name} is missing" for name in sorted(info["missing_keys"])]
        if told:
            raise UserError(
                f"model.policy.name_or_path: the weights of {self.name_or_path!r} are not those of its config.json: "
                f"{'; '.join(told[:3])}{f' (and {len(told) - 3} more)' if len(told) > 3 else ''}. Take both from one "
                "source, or train from random weights by model.policy.from_scratch: true."
            )

    def _load(self, factory: Any, part: str, **kwargs: Any) -> Any:
        looks_local = self.name_or_path.startswith((".", "/", "~")) or Path(self.name_or_path).exists()
        if looks_local and not Path(self.name_or_path).is_dir():
            raise UserError(f"model.policy.name_or_path: {self.name_or_path!r} is not a folder.")
        with self._told(part):
            return factory.from_pretrained(
                self.name_or_path, trust_remote_code=self.trust_remote_code, revision=self.revision, **kwargs
            )

    @contextmanager
    def _told(self, part: str) -> Iterator[None]:
        """What transformers says of a model that it cannot load, as a mistake in the config."""
        try:
            yield
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).strip().split("\n")[:2])
            raise UserError(
                f"model.policy.name_or_path: cannot load the {part} of {self.name_or_path!r}: {reason} {self._remedy}"
            ) from error

    @property
    def _remedy(self) -> str:
        """What helps where a model cannot be loaded."""
        if not Path(self.name_or_path).is_dir() and HF_HUB_OFFLINE:
            return (
                f"HF_HUB_OFFLINE is set, so nothing is fetched: config.json, the tokenizer and the weights of "
                f"{self.name_or_path!r} (revision {self.revision}) have to stand in {HF_HUB_CACHE}. Download them "
                "beforehand (hf download), or unset HF_HUB_OFFLINE."
            )
        return (
            "Give a folder that holds it, or a name on the hub with a network (a folder without weights needs "
            "model.policy.from_scratch: true; a model with Python code of its own, if you trust it, "
            "model.policy.trust_remote_code: true; another kernel, model.policy.attn_implementation: sdpa)."
        )


class ValueHead(nn.Module):
    """A linear map from hidden states to values, in float32, which starts at 0."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(lm.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor, completion_mask: Tensor) -> Tensor:
        """Value of the state before each completion token, (B, T) float32, 0 where the mask is false.

        Args:
            states: (N, D) of the trunk, before each token that the mask is true at
            completion_mask: (B, T) bool
        """
        with torch.autocast(states.device.type, enabled=False):
            values = self.linear(states.to(self.linear.weight.dtype)).squeeze(-1)
        return torch.zeros_like(completion_mask, dtype=values.dtype).masked_scatter(completion_mask, values)


class Policy(nn.Module):
    """A causal language model whose forward pass gives the statistics of the tokens that count.

    Dropout is off for good: sampler, scorer and trainer must agree on every log-probability.

    Args:
        lm: the model
        value_head: a critic's head on the model's trunk, where one is trained
    """

    def __init__(self, lm: nn.Module, value_head: ValueHead | None = None) -> None:
        super().__init__()
        self.lm: Any = lm
        self.value_head = value_head
        _disable_dropout(lm)
        self.lm.train()
        _check_linear_head(self.lm)
        self.passes = Passes(use_packing(lm))

    def forward(
        self, input_ids: Tensor, completion_mask: Tensor, temperature: float = 1.0, with_entropies: bool = True
    ) -> NetworkOutputs:
        """Log-probability, entropy and value of each completion token, all (B, T), 0 where the mask is false.

        Args:
            input_ids: (B, T)
            completion_mask: (B, T) bool; never true at position 0, which nothing predicts
            temperature: the sampling temperature
            with_entropies: whether anybody asks for them; otherwise they are 0
        """
        return self._statistics_of([Sequences(input_ids, completion_mask, temperature, with_entropies)])[0]

    def together(self, *parts: Sequences) -> list[NetworkOutputs]:
        """What ``forward`` gives for each of several batches, whose rows share the passes through the trunk."""
        return self._statistics_of(parts)

    def _statistics_of(self, parts: Sequence[Sequences]) -> list[NetworkOutputs]:
        states = self.passes.states(self.lm.get_decoder(), parts)
        return [self._statistics(own, part) for own, part in zip(states, parts, strict=True)]

    def _statistics(self, states: Tensor, part: Sequences) -> NetworkOutputs:
        """From the states before the completion tokens, (N, D), to (B, T)."""
        ids, mask = part.input_ids, part.completion_mask
        head = self.lm.get_output_embeddings()
        chosen = ids[:, 1:][mask[:, 1:]]
        stats = token_stats(states, head, chosen, temperature=part.temperature, with_entropies=part.with_entropies)
        blank = torch.zeros_like(ids, dtype=stats.logprobs.dtype)
        values = None if self.value_head is None else self.value_head(states, mask)
        logprobs, entropies = (blank.masked_scatter(mask, values) for values in stats)
        return NetworkOutputs(logprobs, entropies, values)


def end_of_sequence_ids(lm: Any, tokenizer: Any) -> list[int]:
    """All ids that end a completion: the tokenizer's EOS and those that the model declares."""
    declared = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    declared = [] if declared is None else declared if isinstance(declared, list) else [declared]
    return sorted({tokenizer.eos_token_id, *declared})


def _disable_dropout(lm: nn.Module) -> None:
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # rates that models hand to functional dropout
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _check_linear_head(lm: Any) -> None:
    """Some models scale or cap their logits after the head; their log-probabilities would be silently wrong here.

    Named settings are looked up, since a cap is invisible while logits are small; a forward pass finds the others.
    """
    text_config = lm.config.get_text_config()
    for setting in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text_config, setting, None) not in (None, 1, 1.0):
            _refuse_head(lm, setting)
    parameter = next(lm.parameters())
    if parameter.is_meta:
        return
    probe = torch.arange(4, device=parameter.device).unsqueeze(0)
    with torch.no_grad():
        logits = lm(input_ids=probe, use_cache=False).logits
        hidden = lm.get_decoder()(input_ids=probe, use_cache=False).last_hidden_state
        linear = lm.get_output_embeddings()(hidden)
    if not torch.allclose(logits, linear.to(logits.dtype), rtol=1e-2, atol=1e-3):
        _refuse_head(lm, "its forward pass")


def _refuse_head(lm: Any, where: str) -> None:
    raise UserError(
        f"model.policy.name_or_path: {type(lm).__name__} changes its logits after the output layer ({where}), which is "
        "not supported. Use a model whose logits are a linear map of the last hidden state."
    )
