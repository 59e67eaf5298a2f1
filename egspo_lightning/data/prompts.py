r"""Prompt template: problems to token ids, the same in training and in sampling.

Prompt and completion are tokenized separately, so that a demonstration has exactly the prompt ids of sampling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from egspo_lightning.chat_turns import assistant_text, turn_end
from egspo_lightning.errors import UserError
from egspo_lightning.rewards.think_blocks import close_opened_block
from egspo_lightning.types import Demonstration, Problem, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBLEM = "{problem}"
_SYSTEM = "{system}"
_FIXED = ("messages", "conversation", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict")
"""Arguments of ``apply_chat_template`` that a prompt template sets itself."""


@dataclass(frozen=True)
class PromptTemplate:
    r"""Turns a problem into a prompt, with the tokenizer's chat template or as plain text.

    Braces in a problem's text are safe. The tokenizer decides whether text that spells a special token becomes that
    token (``split_special_tokens``). A chat template receives the earlier turns of a conversation as messages; plain
    text has them before the problem, separated by blank lines.

    Args:
        system: The instruction: the system message of a chat, and "{system}" in plain text; may be empty. A problem
            with a system message of its own keeps that one instead.
        plain: The text for models without a chat template. It has "{problem}" exactly once, and "{system}" where the
            instruction belongs. With an empty instruction, blank lines at the beginning are dropped.
        use_chat_template: "auto" (where there is one), "always" (an error where there is none) or "never".
        chat_template_kwargs: Variables for the chat template, such as {enable_thinking: false} for Qwen3.

    Raises:
        UserError: plain lacks "{problem}" or has it twice, or chat_template_kwargs cannot be used.
    """

    system: str = "Please reason step by step, and put your final answer within \\boxed{}."
    plain: str = "{system}\n\n{problem}\n\n"
    use_chat_template: Literal["auto", "always", "never"] = "auto"
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.plain.count(_PROBLEM) != 1:
            raise UserError(
                f'plain must contain "{_PROBLEM}" exactly once, got {self.plain!r}. '
                f'Put "{_PROBLEM}" where the question belongs.'
            )
        if fixed := [name for name in self.chat_template_kwargs or {} if name in _FIXED]:
            raise UserError(
                f"chat_template_kwargs sets {fixed[0]}, which the prompt template sets itself. Give variables of the "
                "chat template, such as enable_thinking."
            )

    def render(self, tokenizer: PreTrainedTokenizerBase, problem_text: str, context: Sequence[Turn] = ()) -> str:
        """Return the prompt as text; ``context`` holds the turns before the problem.

        Raises:
            UserError: a chat template is asked for and there is none, or it does not have the variables of
                ``chat_template_kwargs``, or it refuses the messages.
        """
        if self._is_chat(tokenizer):
            return self._render_chat(tokenizer, problem_text, context)
        if self.chat_template_kwargs:
            raise UserError(
                f"chat_template_kwargs = {self.chat_template_kwargs}, but no chat template is used: the tokenizer has "
                'none, or use_chat_template is "never". Leave chat_template_kwargs out.'
            )
        system, turns = self._system_and_turns(context)
        before, _, after = self.plain.partition(_PROBLEM)
        before, after = before.replace(_SYSTEM, system), after.replace(_SYSTEM, system)
        told = "\n\n".join([*(text for _, text in turns), problem_text])
        return (before if system else before.lstrip("\n")) + told + after

    def encode(self, tokenizer: PreTrainedTokenizerBase, problem_text: str, context: Sequence[Turn] = ()) -> list[int]:
        """Return the prompt as token ids.

        A chat template writes its special tokens itself. Plain text gets a BOS where the tokenizer adds one to any
        text, and never an EOS.

        Raises:
            UserError: as ``render`` does.
        """
        return self._prompt_ids(tokenizer, self.render(tokenizer, problem_text, context))

    def _prompt_ids(self, tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
        ids: list[int] = tokenizer.encode(rendered, add_special_tokens=False)
        bos_id = tokenizer.bos_token_id
        if not self._is_chat(tokenizer) and bos_id is not None and tokenizer.encode("")[:1] == [bos_id]:
            return [bos_id, *ids]
        return ids

    def encode_demonstration(
        self, tokenizer: PreTrainedTokenizerBase, demonstration: Demonstration
    ) -> tuple[list[int], list[int]]:
        """Return the ids of the prompt, and of the solution with its end.

        After plain text the end is the EOS. In a chat, solution and end are what the template writes for the
        assistant's turn, up to and with the token that ends it; a template without such a token gets the EOS. A
        block of reasoning that the prompt opens is closed, see ``close_opened_block``.

        Raises:
            UserError: as ``render`` does.
        """
        problem, context = demonstration.problem, demonstration.context
        prompt = self.render(tokenizer, problem, context)
        text, end_id = demonstration.solution, tokenizer.eos_token_id
        if self._is_chat(tokenizer) and (end := turn_end(tokenizer)):
            text = assistant_text(self._render_chat(tokenizer, problem, context, text), prompt, text, end)
            end_id = tokenizer.convert_tokens_to_ids(end)
        text = close_opened_block(text, prompt)
        return self._prompt_ids(tokenizer, prompt), [*tokenizer.encode(text, add_special_tokens=False), end_id]

    def _is_chat(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        if self.use_chat_template == "always" and not tokenizer.chat_template:
            raise UserError(
                'use_chat_template is "always", but the tokenizer has no chat template. '
                'Set it to "auto", or use a model that was tuned for chat.'
            )
        return self.use_chat_template != "never" and bool(tokenizer.chat_template)

    def _system_and_turns(self, context: Sequence[Turn]) -> tuple[str, Sequence[Turn]]:
        """The system message, and the turns between it and the problem."""
        if context and context[0][0] == "system":
            return context[0][1], context[1:]
        return self.system, context

    def _render_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        problem_text: str,
        context: Sequence[Turn],
        solution: str | None = None,
    ) -> str:
        """The prompt, or, with a solution, the whole conversation."""
        system, turns = self._system_and_turns(context)
        turns = [("system", system)] * bool(system) + [*turns, ("user", problem_text)]
        if solution is not None:
            turns.append(("assistant", solution))
        messages = [{"role": role, "content": text} for role, text in turns]
        variables = self._variables(tokenizer)
        try:
            rendered = tokenizer.apply_chat_template(
                messages, add_generation_prompt=solution is None, tokenize=False, **variables
            )
        except TemplateError as error:
            raise UserError(
                f"The tokenizer's chat template refuses the roles {', '.join(role for role, _ in turns)}: {error}. "
                'If it has no system message, set system to "" and remove those of the data, or set use_chat_template '
                'to "never".'
            ) from error
        return str(rendered)

    def _variables(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The variables of the chat template; transformers ignores unknown ones."""
        variables, template = self.chat_template_kwargs or {}, str(tokenizer.chat_template)
        if unknown := [name for name in variables if not re.search(rf"\b{re.escape(name)}\b", template)]:
            raise UserError(
                f"chat_template_kwargs sets {unknown[0]}, which the tokenizer's chat template never reads. Correct the "
                "name, or leave it out."
            )
        return variables


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes problems as token ids and refuses prompts that are too long."""

    template: PromptTemplate
    tokenizer: Any
    max_length: int

    def encode(self, problem: Problem) -> list[int]:
        """Return the token ids of the prompt.

        Raises:
            UserError: the prompt has more than ``max_length`` tokens.
        """
        ids = self.template.encode(self.tokenizer, problem.problem, problem.context)
        if len(ids) > self.max_length:
            raise UserError(
                f"data.max_prompt_length = {self.max_length} is shorter than the prompt of problem {problem.id!r}, "
                f"which has {len(ids)} tokens. Raise it to {len(ids)} or more, or, for training problems, set "
                "data.long_problems: drop."
            )
        return ids
