"""Help pages: this project's own flags in groups; those of Lightning are behind ``--help_all``."""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args, get_origin

from jsonargparse import DefaultHelpFormatter

OPTIONS = {
    "help": "Show this page.",
    "config": "Config file; a later one overrides an earlier one.",
    "seed_everything": "Seed of everything random; true draws one.",
    "ckpt_path": "Checkpoint to resume or to measure; last is that of the latest run.",
    "weights_only": "false also loads checkpoints that hold code, which then runs.",
    "verbose": "Whether to print Lightning's table of scores as well.",
    "return_predictions": "Has no effect here: the answers are written to a file.",
}
"""Sentences for options whose own text is for callers of the Trainer."""


INDENT = 4


class HelpAll(argparse._HelpAction):
    """Prints the page with every flag, its type and Lightning's text."""

    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        """Print and exit."""
        parser.hidden = ()
        super().__call__(parser, *args, **kwargs)


class ShortFormatter(DefaultHelpFormatter):
    """Flag, choices and default, then the first sentence of the text, or its first part if it is longer than a line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=INDENT)

    def format_help(self) -> str:
        """The page without blank lines: titles of groups stand out by their indent."""
        return super().format_help().replace("\n\n", "\n")

    def _format_action(self, action: argparse.Action) -> str:
        lines = [line.strip() for line in super()._format_action(action).splitlines()]
        joined = f"  {'  '.join(lines)}\n"
        return joined if len(lines) == 2 and len(joined) <= self._width else super()._format_action(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not hasattr(action, "_typehint"):
            return super()._format_action_invocation(action)
        hints = [action._typehint, *get_args(action._typehint)]
        choices = [str(value) for hint in hints if get_origin(hint) is Literal for value in get_args(hint)]
        kind = f" {{{','.join(choices)}}}" if choices else ""
        return f"{action.option_strings[0]}{kind} ({'required' if action.required else _shown(action.default)})"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = OPTIONS.get(action.dest, action.help or "")
        sentence = text.replace("``", "").partition(". ")[0].removesuffix(".")
        return (sentence if len(sentence) < self._width - INDENT else sentence.partition("; ")[0]) + "."


@contextmanager
def short_page(parser: Any, hidden: Sequence[str]) -> Iterator[None]:
    """Let the parser's help leave out the hidden sections, and the helpers that jsonargparse adds for each class."""
    kept = parser._action_groups, parser.formatter_class
    parser._action_groups, parser.formatter_class = _groups(parser, hidden), ShortFormatter
    try:
        yield
    finally:
        parser._action_groups, parser.formatter_class = kept


def _groups(parser: Any, hidden: Sequence[str]) -> list[Any]:
    """Copies of the parser's groups; keys outside of sections come first, with the options."""
    options, *sections = map(copy.copy, parser._action_groups[1:])
    options._group_actions = [action for action in parser._actions if "." not in action.dest and _is_shown(action)]
    for group in sections:
        group.title = group.title.replace("``", "")
        inside = [action for action in group._group_actions if "." in action.dest and _is_shown(action)]
        group._group_actions = [action for action in inside if action.dest.partition(".")[0] not in hidden]
    return [options, *sections]


def _is_shown(action: argparse.Action) -> bool:
    """Whether it is no ``--KEY.help``, no flag that reads a section from a file, and no link to another key."""
    return action.metavar not in ("CONFIG", "[applied on parse]") and not action.dest.endswith(".help")


def _shown(value: Any) -> str:
    """A default as a config has it; that of a class is its name."""
    if hasattr(value, "get"):
        return str(value.get("class_path")).rpartition(".")[2]
    return json.dumps(value) if value is None or isinstance(value, bool) or "\n" in str(value) else str(value)
