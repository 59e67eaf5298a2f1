"""Command-line parser: class names of the package in short form, and error messages with a remedy."""

import re
from argparse import HelpFormatter
from collections.abc import Iterator, Sequence
from inspect import Parameter, isabstract, isclass, isfunction, signature
from pydoc import locate
from typing import Any, NoReturn, get_args

from lightning.pytorch.cli import LightningArgumentParser

import egspo_lightning
from egspo_lightning.cli.help_pages import short_page
from egspo_lightning.errors import did_you_mean

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

    hidden: Sequence[str] = ()
    """Sections that ``--help`` leaves out."""

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """The short page where sections are hidden, else jsonargparse's page."""
        if not self.hidden:
            return super().format_help(formatter)
        with short_page(self, self.hidden):
            return super().format_help(formatter)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message with a remedy, and end with exit code 2."""
        keys = re.findall(r'Parser key "([\w.]+)"', message)
        if package := missing_package(message):
            message = f"{keys[0]}: {package}" if keys else package
        names = self._known_names(message, keys[0]) if len(keys) == 1 else ""  # else the inner parser has answered
        super().error(message + names + unfit_class(message), ex)

    def _known_names(self, message: str, key: str) -> str:
        """The class names that a key accepts, where the given one is unknown."""
        unknown = NOT_FOUND.search(message)
        hints = [getattr(action, "_typehint", None) for action in self._actions if action.dest == key]
        ours = {name for hint in hints for name in class_names(hint)}
        every = ours | {name for hint in hints for name in _subclass_names(hint)}
        if unknown is None or not every:
            return ""
        given = next(filter(None, unknown.groups())).rpartition(".")[2]
        return f"\n{did_you_mean(given, ours or every, every)}; or the dotted path of a class of your own."


def class_names(hint: Any) -> Iterator[str]:
    """Names of the public classes that a value of this type may be, also within lists, dictionaries and unions."""
    for name, part in PARTS.items():
        is_kind = isclass(part) and hint in part.__mro__
        if is_kind and not isabstract(part) and not getattr(part, "_is_protocol", False):
            yield name
    for inner in get_args(hint):
        yield from class_names(inner)


def _subclass_names(hint: Any) -> Iterator[str]:
    """Names of all imported subclasses of the classes in a type, such as Lightning's loggers and torch's optimizers."""
    for part in hint.__subclasses__() if isclass(hint) else get_args(hint):
        if isclass(hint) and not part.__name__.startswith("_"):
            yield part.__name__
        yield from _subclass_names(part)


def missing_package(message: str) -> str:
    """How to install the optional package that a class needs; empty if no such package is missing."""
    missing = re.search(r"No module named '(\w+)|Requirement '([\w-]+)", message)
    name = missing and (missing.group(2) or missing.group(1) * (missing.group(1) in EXTRAS))
    if not name:
        return ""
    command = f'"egspo-lightning[{EXTRAS[name]}]"' if name in EXTRAS else f"-U {name}"
    return f"the package {name} is missing or too old. Install it: pip install {command}"


def unfit_class(message: str) -> str:
    """Name the argument, method or annotation that a class lacks; empty if it lacks nothing."""
    if found := re.search(r"given class_path '(\S+)':\s+Option '(\w+)' is not accepted", message):
        return f"\n{did_you_mean(found[2], signature(_located(found[1])).parameters)}."
    if found := re.search(r"instantiatable class, but (\S+) is abstract", message):
        return f"\n{found[1]} lacks methods: {', '.join(sorted(_located(found[1]).__abstractmethods__))}."
    if found := re.search(r"Import path (\S+) does not implement protocol (\w+)", message):
        return "".join(f"\n{found[1]} {gap}" for gap in protocol_gaps(_located(found[1]), PARTS[found[2]]))
    return ""


def _located(path: str) -> Any:
    return locate(path)


def protocol_gaps(given: Any, protocol: type) -> Iterator[str]:
    """For each method of a protocol that a class lacks or declares differently, the line that it needs."""
    for name, method in vars(protocol).items():
        if not isfunction(method) or (name.startswith("_") and name != "__call__"):
            continue
        own = next((vars(c)[name] for c in given.__mro__ if name in vars(c)), None) if isclass(given) else given
        needed = _declaration(name, method)
        if own is None:
            yield f"has no method {name}; it needs: {needed}"
        elif (declared := _declaration(name, own)) != needed:
            default = "; its further parameters need a default" if len(_required(own)) > len(_required(method)) else ""
            yield f"declares {declared}; it needs: {needed}{default}"


def _required(method: Any) -> list[str]:
    """Parameters without a default; a function beside a method of a protocol has no ``self`` to count."""
    try:
        parameters = signature(method).parameters.values()
    except (TypeError, ValueError):
        return []
    variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is Parameter.empty and p.kind not in variable and p.name != "self"]


def _declaration(name: str, method: Any) -> str:
    """The line that declares a method; functions in C may hide their arguments."""
    try:
        arguments = str(signature(method))
    except (TypeError, ValueError):
        arguments = "(...)"
    return f"def {name}{arguments}".replace("'", "")  # postponed annotations are texts
