"""Command-line parser: class names of the package in short form, and error messages with a remedy."""

import difflib
import re
from collections.abc import Iterator
from inspect import isabstract, isclass
from typing import Any, NoReturn, get_args

from lightning.pytorch.cli import LightningArgumentParser

import egspo_lightning

EXTRAS = {"bitsandbytes": "8bit", "peft": "lora", "vllm": "vllm"}
"""Optional package to the extra that installs it."""

PARTS = {name: getattr(egspo_lightning, name) for name in egspo_lightning.__all__}
"""All public names, imported here: jsonargparse resolves the short name of a class that has been imported."""

NOT_FOUND = re.compile(
    r"""Expected\ a\ dot\ import\ path\ string:\ (\S+)   # a name without a module that nothing has
    |Problem\ with\ given\ class_path\ '(\S+)':\s+       # a dotted path that cannot be imported
    (?:module\ \S+\ has\ no\ attribute|No\ module\ named)
    |Import\ path\ (\S+)\ does\ not                      # a class of another kind
    """,
    re.VERBOSE,
)


class Parser(LightningArgumentParser):
    """Lightning's parser, which also says what to install for a missing package, and which class names exist."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and end with exit code 2."""
        super().error(message + missing_package(message) + self._known_names(message), ex)

    def _known_names(self, message: str) -> str:
        """The class names that a key accepts, where the given one is unknown; the key is the one in the message."""
        keys, unknown = re.findall(r'Parser key "([\w.]+)"', message), NOT_FOUND.search(message)
        if unknown is None or len(keys) != 1:  # more keys: the parser of the inner one has answered already
            return ""
        hints = [getattr(action, "_typehint", None) for action in self._actions if action.dest == keys[0]]
        names = sorted({name for hint in hints for name in class_names(hint)})
        if not names:
            return ""
        given = next(filter(None, unknown.groups())).rpartition(".")[2]
        close = difflib.get_close_matches(given, names, n=1)
        guess = f"Did you mean {close[0]}? " if close else ""
        return f"\n{guess}Known here: {', '.join(names)}; or the dotted path of a class of your own."


def class_names(hint: Any) -> Iterator[str]:
    """Names of the public classes that a value of this type may be, also within lists, dictionaries and unions."""
    for name, part in PARTS.items():
        is_kind = isclass(part) and hint in part.__mro__
        if is_kind and not isabstract(part) and not getattr(part, "_is_protocol", False):
            yield name
    for inner in get_args(hint):
        yield from class_names(inner)


def missing_package(message: str) -> str:
    """How to install the optional package that a class needs; empty if no such package is missing."""
    missing = re.search(r"No module named '(\w+)", message)
    if missing is None or missing.group(1) not in EXTRAS:
        return ""
    return f'\nInstall it: pip install "egspo-lightning[{EXTRAS[missing.group(1)]}]"'
