"""The policy: any causal language model of transformers, with its tokenizer, seen as per-token statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from egspo_lightning.errors import UserError
from egspo_lightning.ops.token_stats import TokenStats, token_stats

LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError)
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
    """

    name_or_path: str
    from_scratch: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    revision: str = "main"

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

    def build(self) -> Policy:
        """The model, in train mode, without dropout.

        Raises:
            UserError: it cannot be loaded, or its output layer is more than a linear map of the last hidden state.
        """
        dtype = getattr(torch, self.dtype)
        attention = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        if self.from_scratch:
            config = self._load(AutoConfig, "config")
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
        else:
            lm = self._load(AutoModelForCausalLM, "weights", dtype=dtype, **attention)
        if self.gradient_checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return Policy(lm)

    def _load(self, factory: Any, part: str, **kwargs: Any) -> Any:
        looks_local = self.name_or_path.startswith((".", "/", "~")) or Path(self.name_or_path).exists()
        if looks_local and not Path(self.name_or_path).is_dir():
            raise UserError(f"model.policy.name_or_path: {self.name_or_path!r} is not a folder.")
        try:
            return factory.from_pretrained(
                self.name_or_path, trust_remote_code=self.trust_remote_code, revision=self.revision, **kwargs
            )
        except LOADING_ERRORS as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"model.policy.name_or_path: cannot load the {part} of {self.name_or_path!r}: {reason} Give a "
                "folder that holds it, or a name on the hub with a network (a folder without weights needs "
                "model.policy.from_scratch: true)."
            ) from error


class Policy(nn.Module):
    """A causal language model whose forward pass gives the statistics of the tokens that count.

    Dropout is off for good: sampler, scorer and trainer must agree on every log-probability.
    """

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm: Any = lm
        _disable_dropout(lm)
        self.lm.train()
        _check_linear_head(self.lm)

    def forward(self, input_ids: Tensor, completion_mask: Tensor, temperature: float = 1.0) -> TokenStats:
        """Log-probability and entropy of each completion token, both (B, T), 0 where the mask is false.

        Sequences are padded on the right, so under causal attention no token ever sees padding, and no attention
        mask is needed: positions count from 0 in every row, and the fast attention kernels apply.

        Args:
            input_ids: (B, T)
            completion_mask: (B, T) bool; never true at position 0, which nothing predicts
            temperature: the sampling temperature
        """
        targets = completion_mask[:, 1:]
        hidden = self.lm.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, D)
        stats = token_stats(
            hidden[:, :-1][targets],  # (N, D): the state before each completion token
            self.lm.get_output_embeddings(),
            input_ids[:, 1:][targets],
            temperature=temperature,
        )
        blank = torch.zeros_like(input_ids, dtype=stats.logprobs.dtype)
        return TokenStats(*(blank.masked_scatter(completion_mask, values) for values in stats))


def end_of_sequence_ids(lm: Any, tokenizer: Any) -> list[int]:
    """All ids that end a completion: the tokenizer's EOS and those that the model declares."""
    declared = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    declared = [] if declared is None else declared if isinstance(declared, list) else [declared]
    return sorted({tokenizer.eos_token_id, *declared})


def _disable_dropout(lm: nn.Module) -> None:
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  an attribute of many model classes


def _check_linear_head(lm: Any) -> None:
    """Some models scale or cap their logits after the head; their log-probabilities would be silently wrong here."""
    parameter = next(lm.parameters())
    if parameter.is_meta:
        return
    probe = torch.arange(4, device=parameter.device).unsqueeze(0)
    with torch.no_grad():
        logits = lm(input_ids=probe, use_cache=False).logits
        hidden = lm.get_decoder()(input_ids=probe, use_cache=False).last_hidden_state
        linear = lm.get_output_embeddings()(hidden)
    if not torch.allclose(logits, linear.to(logits.dtype), rtol=1e-2, atol=1e-3):
        raise UserError(
            f"model.policy.name_or_path: {type(lm).__name__} changes its logits after the output layer (capping or "
            "scaling), which is not supported. Use a model whose logits are a linear map of the last hidden state."
        )
