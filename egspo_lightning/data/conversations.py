"""Conversations of chat data: lists of {role, content}, split into context, problem and solution."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from egspo_lightning.errors import UserError
from egspo_lightning.types import Turn

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""Parts of a message that are neither trained on nor shown to the policy; dropping them would change the message."""


class Conversation(NamedTuple):
    """A conversation up to the last turn of the user, and the assistant's answer to it."""

    context: tuple[Turn, ...]
    """Turns before the problem, the system message first."""
    problem: str
    """The last turn of the user."""
    solution: str | None
    """The assistant's turn at the end; None where the conversation ends in the user's."""


def is_messages(value: Any) -> bool:
    """Whether a value is meant as a list of messages: a list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, Mapping) for part in value)


def read_messages(value: Any, field: str, where: str) -> list[Turn]:
    """Return the turns of a list of messages; system messages without text are left out.

    Content may be text or a list of text parts, which are joined as chat templates do, without a separator.

    Raises:
        UserError: a message has another shape, role or part, or holds a tool call or reasoning of its own.
    """
    if not is_messages(value):
        raise UserError(
            f"{where}: field {field!r} must be a list of messages, each with role and content, got {_shown(value)}. "
            "CSV cannot hold lists: use JSON Lines or Parquet."
        )
    turns = [_turn(message, f"{where}: field {field!r}, message {n}") for n, message in enumerate(value, start=1)]
    return [turn for turn in turns if turn != ("system", "")]


def split_turns(turns: Sequence[Turn], field: str, where: str) -> Conversation:
    """Split turns at the last one of the user; the assistant's turn behind it is the solution.

    Raises:
        UserError: a system message is not the first, or the conversation does not end in a turn of the user or in an
            answer to one.
    """
    roles = [role for role, _ in turns]
    if "system" in roles[1:]:
        raise UserError(
            f"{where}: field {field!r} has a system message at place {roles.index('system', 1) + 1}. " + _FORM
        )
    is_answered = roles[-1:] == ["assistant"]
    end = len(turns) - is_answered
    if roles[max(end - 1, 0) : end] != ["user"]:
        raise UserError(f"{where}: field {field!r} has the roles {', '.join(roles) or 'none'}. " + _FORM)
    return Conversation(tuple(turns[: end - 1]), turns[end - 1][1], turns[-1][1] if is_answered else None)


_FORM = (
    "A conversation is a system message or none, turns of user and assistant, then the user's question, and for a "
    "demonstration the assistant's answer. Correct the row or remove it."
)


def _turn(message: Mapping[str, Any], where: str) -> Turn:
    if not {"role", "content"} <= message.keys():
        raise UserError(
            f"{where} has the keys {', '.join(map(str, message)) or 'none'}, but needs role and content. Rename them."
        )
    role = message["role"]
    if role not in _ROLES:
        raise UserError(
            f"{where} has the role {role!r}. Roles are system, user and assistant. Rename the role, or remove the row."
        )
    if held := [key for key in _UNSUPPORTED if message.get(key)]:
        raise UserError(f"{where} holds {held[0]}, which is not supported. Write it into content, or remove the row.")
    text = _content(message["content"], where)
    if not text.strip() and role != "system":
        raise UserError(f"{where} has no text. Correct the row, or remove it.")
    return _ROLES[role], text if text.strip() else ""


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not is_messages(content):
        raise UserError(f"{where}: content must be text or a list of text parts, got {_shown(content)}.")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{where}: content has a part of type {part.get('type')!r}. Parts must be "
                '{"type": "text", "text": ...}: images and other media are not supported. Remove the row.'
            )
    return "".join(part["text"] for part in content)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
