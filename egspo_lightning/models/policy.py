"""The policy: log-probabilities, entropies and values of completion tokens from a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from egspo_lightning.chat_turns import turn_end_id
from egspo_lightning.errors import PASS_ERRORS, UserError
from egspo_lightning.models.batched_forward import Sequences, TrunkPasses
from egspo_lightning.models.packed_attention import trunk_of
from egspo_lightning.ops.token_stats import token_stats
from egspo_lightning.types import NetworkOutputs


class Policy(nn.Module):
    """A causal language model whose forward pass returns statistics of the completion tokens.

    Dropout is always off: sampling, scoring and training must compute the same log-probabilities. The value head, if
    any, is that of a critic that shares the model's trunk.

    Raises:
        UserError: the output layer is more than a linear map of the last hidden state.
    """

    def __init__(self, lm: nn.Module, value_head: ValueHead | None = None) -> None:
        super().__init__()
        self.lm: Any = lm
        self.value_head = value_head
        _disable_dropout(lm)
        self.lm.train()
        _check_linear_head(self.lm)
        self.passes = TrunkPasses(lm)

    @property
    def trunk(self) -> Any:
        """The model without its output layer."""
        return trunk_of(self.lm)

    def forward(
        self, input_ids: Tensor, completion_mask: Tensor, temperature: float = 1.0, with_entropies: bool = True
    ) -> NetworkOutputs:
        """Log-probability, entropy and value of each completion token, all (B, T), 0 where the mask is false.

        The arguments are the fields of ``Sequences``.
        """
        return self._outputs([Sequences(input_ids, completion_mask, temperature, with_entropies)])[0]

    def together(self, *parts: Sequences) -> list[NetworkOutputs]:
        """The outputs of ``forward`` for each of several batches, whose rows share passes through the trunk."""
        return self._outputs(parts)

    def _outputs(self, parts: Sequence[Sequences]) -> list[NetworkOutputs]:
        states = self.passes.states(self.trunk, parts)
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


class ValueHead(nn.Module):
    """A linear map from hidden states to values, in float32, initialized to 0."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(lm.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor, completion_mask: Tensor) -> Tensor:
        """Values, (B, T) float32, 0 where the mask is false; from the states before the N completion tokens, (N, D)."""
        with torch.autocast(states.device.type, enabled=False):
            values = self.linear(states.to(self.linear.weight.dtype)).squeeze(-1)
        return torch.zeros_like(completion_mask, dtype=values.dtype).masked_scatter(completion_mask, values)


def end_of_sequence_ids(lm: Any, tokenizer: Any) -> list[int]:
    """All ids that end a completion: the tokenizer's EOS, the model's own, and the chat template's end of a turn."""
    declared = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    more = declared if isinstance(declared, list) else [declared]
    return sorted({tokenizer.eos_token_id, turn_end_id(tokenizer), *more} - {None})


def _disable_dropout(lm: nn.Module) -> None:
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # rates that models pass to functional dropout
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _check_linear_head(lm: Any) -> None:
    """Refuse models that scale or cap their logits after the head: by their settings, and by a forward pass."""
    text_config = lm.config.get_text_config()
    for setting in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(text_config, setting, None) not in (None, 1):
            _refuse_head(lm, setting)
    parameter = next(lm.parameters())
    if parameter.is_meta:
        return
    probe = torch.arange(4, device=parameter.device).unsqueeze(0)
    try:
        with torch.no_grad():
            logits = lm(input_ids=probe, use_cache=False).logits
            hidden = trunk_of(lm)(input_ids=probe, use_cache=False).last_hidden_state
            linear = lm.get_output_embeddings()(hidden)
    except PASS_ERRORS as error:
        raise UserError(
            f"model.policy.name_or_path: the forward pass of {type(lm).__name__} on four tokens failed: "
            f"{type(error).__name__}: {error}. Check its config.json, choose another model.policy.attn_implementation, "
            "or another model."
        ) from error
    if logits.shape != linear.shape or not torch.allclose(logits, linear.to(logits.dtype), rtol=1e-2, atol=1e-3):
        _refuse_head(lm, "its forward pass")


def _refuse_head(lm: Any, where: str) -> None:
    raise UserError(
        f"model.policy.name_or_path: {type(lm).__name__} changes its logits after the output layer ({where}), which is "
        "not supported. Use a model whose logits are a linear map of the last hidden state."
    )
