"""End of an assistant's turn in a chat template, such as Gemma's ``<end_of_turn>``; often it is not the EOS."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "probe of a turn"


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first added token that the chat template writes after an assistant's text; None without such a token."""
    return _turn_end(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else None


@lru_cache(maxsize=8)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """``turn_end`` of a tokenizer with this template: asked for each demonstration, and found once."""
    messages = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError):  # a template for prompts alone
        return None
    _, found, tail = rendered.rpartition(_PROBE)
    added = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    places = [(tail.find(token), -len(token), token) for token in added if token.strip() and token in tail]
    return min(places)[2] if found and places else None


def turn_end_id(tokenizer: Any) -> int | None:
    """Id of ``turn_end``."""
    end = turn_end(tokenizer)
    return None if end is None else int(tokenizer.convert_tokens_to_ids(end))


def assistant_text(rendered: str, prompt: str, text: str, end: str) -> str:
    """Text that the chat template writes behind the prompt for an assistant's text, without the end of the turn.

    It may strip whitespace, or write some, or an empty think block, around the text. Where it changes the text itself,
    or does not continue the prompt, the text is returned as it is.

    Args:
        rendered: the whole conversation, with the assistant's turn
        prompt: the conversation up to the assistant's turn
        text: the assistant's text
        end: the token that ends the turn
    """
    turn = rendered.removeprefix(prompt).rpartition(end)[0] if rendered.startswith(prompt) else ""
    return turn if text.strip() in turn else text
