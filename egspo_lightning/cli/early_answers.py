"""Answers that need no torch: help on commands, methods and classes, and typos in commands, flags, keys and file names.

Whatever these checks do not know is left to the parser, which sees every argument again.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

import yaml

import egspo_lightning
from egspo_lightning.cli.config_files import flags_of, keys_of, read_config, shipped_path, use_configs
from egspo_lightning.cli.known_keys import classes_of, find, known_keys, similar_keys
from egspo_lightning.cli.methods import methods_table
from egspo_lightning.cli.report_command import write_report
from egspo_lightning.errors import UserError, did_you_mean

COMMANDS = {
    "fit": "Train a policy by SFT, then by EGSPO or another method.",
    "validate": "Measure the benchmarks of a config, as during training.",
    "test": "Measure the benchmarks of a config.",
    "predict": "Write answers to the problems of a config.",
    "plan": "Estimate the memory that a run needs on each device, before it is run.",
    "replay": "Recompute a non-finite micro-batch, and report what is not finite.",
    "report": "Write a page that tells one or several runs: settings, scores, charts and completions.",
    "example_data": "Write files of generated word problems, to train on as on your own: example_data FOLDER.",
    "compare": "Train several methods from the same SFT checkpoints, and compare their accuracy.",
    "methods": "List the method overlays, with formula and source.",
}
"""Command to its line in ``egspo --help``."""
OTHER_COMMANDS = {"train": "fit", "finetune": "fit", "eval": "test", "evaluate": "test", "generate": "predict"}
FLAG = "--"
KNOWN_PACKAGES = ("egspo_lightning", "lightning", "torch", "transformers")
"""Importing these gives no class of the user a short name."""


def answer_or_exit(arguments: Sequence[str]) -> None:
    """``answer_early``; a mistake ends the process with one message and exit code 2.

    With ``--debug`` the parser reports mistakes, with their tracebacks.
    """
    given = [argument for argument in arguments if argument != "--debug"]
    try:
        answer_early(given)
    except UserError as error:
        if "--debug" not in arguments:
            _print(f"error: {error}", code=2)
        if given[0] == "compare":  # no parser follows
            raise


def answer_early(arguments: Sequence[str]) -> None:
    """Answer what needs no torch, and exit; return where the run needs it.

    Raises:
        UserError: a command, flag, config key, class name or config file is unknown.
        SystemExit: after help or a list.
    """
    command, *rest = [*arguments, ""]
    if command in ("-h", "--help") or not arguments:
        _print(_usage(), code=0 if arguments else 2)
    if command == "--version":
        _print(f"egspo_lightning {egspo_lightning.__version__}")
    if command.startswith("-"):
        return
    if command not in COMMANDS:
        raise UserError(f"no command {command!r}. {did_you_mean(OTHER_COMMANDS.get(command, command), COMMANDS)}.")
    if command == "methods":
        _print(methods_table())
    if command == "example_data" and not {"-h", "--help"}.intersection(rest):
        from egspo_lightning.cli.example_data import write_example_data  # needs jsonargparse

        _print(write_example_data(rest[:-1]))
    if command == "example_data":
        _print(f"usage: egspo example_data [FOLDER]\n\n{COMMANDS[command]}")
    if command == "report":
        _print(write_report(rest[:-1], COMMANDS[command]))
    if command == "compare":
        from egspo_lightning.cli.comparison.compare import main  # needs numpy; it imports no torch

        sys.exit(main(rest[:-1]))
    if command != "replay" and "-h" not in rest and "--help" not in rest:
        check_run(use_configs(rest[:-1]))


def check_run(arguments: Sequence[str]) -> None:
    """Refuse unknown keys, class names and config files of a run; list the classes of a ``--KEY.help`` and exit.

    Raises:
        UserError: naming the file or flag, with a guess.
    """
    flags = list(flags_of(arguments))
    configs = {value: read_config(value) for key, value in flags if key == "config" and value is not None}
    keys = [(f"{path}: ", key, value) for path, config in configs.items() for key, value in keys_of(config)]
    keys += [(FLAG, key, value) for key, value in flags]
    for where, key, value in keys:
        _check_key(where, key)
        if key.endswith(".help") and value is None:
            _list_classes(key.removesuffix(".help"))
    if not any(map(_is_user_class, _texts([value for *_, value in keys]))):
        for where, key, value in keys:
            _check_class(where, key.removesuffix(".help"), value)


def _check_key(where: str, key: str) -> None:
    node, parent = find(key)
    if node is not None:
        return
    inside = find(parent)[0] if parent else known_keys()
    similar = ", ".join((FLAG if where == FLAG else "") + name for name in similar_keys(key, parent))
    guess = f" Did you mean {similar}?" if similar else ""
    known = ", ".join(sorted((inside and inside.below) or ()))
    raise UserError(f"{where}{key}: no such key.{guess} Known{f' in {parent}' if parent else ''}: {known}.")


def _check_class(where: str, key: str, value: Any) -> None:
    """Refuse a short class name that the package does not have."""
    node, _ = find(key)
    name = value.get("class_path") if isinstance(value, dict) else value
    if isinstance(value, list):
        for inner in value:
            _check_class(where, key, inner)
    if node is None or node.kind is None or not isinstance(name, str) or not name.isidentifier():
        return
    is_name = isinstance(yaml.safe_load(name), str) and not os.path.exists(shipped_path(name))  # null is no name
    if is_name and name not in egspo_lightning.__all__:
        known = did_you_mean(name, classes_of(node.kind))
        raise UserError(f"{where}{key}: no class {name}. {known}; or the dotted path of a class of your own.")


def _list_classes(key: str) -> None:
    """Print the classes that a key may name, and exit; the parser answers for other keys."""
    node, _ = find(key)
    if node is None or node.kind is None:
        return
    classes = classes_of(node.kind)
    width = max(map(len, classes))
    lines = [f"  {name:<{width}}  {line}" for name, line in sorted(classes.items())]
    _print(
        f"Classes for --{key}:\n" + "\n".join(lines) + f"\nArguments of one: --{key}.help {min(classes)}"
        "\nA class of your own is named by its dotted path."
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _is_user_class(text: str) -> bool:
    """Whether a text may name a class of the user's; importing it can give further classes a short name."""
    roots = re.findall(r"([A-Za-z_]\w*)\.[A-Za-z_]", text)
    try:
        return any(root not in KNOWN_PACKAGES and find_spec(root) is not None for root in roots)
    except (ImportError, ValueError):  # of an import hook, or of __main__, which has no spec
        return True


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: egspo COMMAND [--config FILE ...] [--KEY VALUE ...]",
            "",
            "commands:",
            *(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()),
            "",
            "egspo COMMAND --help lists the keys. --debug shows the traceback of every error, --version the version.",
        ]
    )


def _print(text: str, code: int = 0) -> NoReturn:
    print(text, file=sys.stderr if code else sys.stdout)
    sys.exit(code)
