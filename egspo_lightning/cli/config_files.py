"""Config files on the command line: those shipped with the package, and checks that name a broken file and its line."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import yaml

import egspo_lightning
from egspo_lightning.errors import UserError, did_you_mean

CONFIG_FLAGS = ("--config", "-c")
_PACKAGE = Path(egspo_lightning.__file__).parent
SHIPPED = next((root for root in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if root.is_dir()), None)
"""The folder configs: package data of an installed wheel, or the one of the checkout."""


def use_configs(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with ``shipped_path`` applied to each ``--config``, and refuse broken config files.

    Modules beside a config can be imported from then on.

    Raises:
        UserError: a file does not exist, is not a YAML mapping, or gives a key twice; the message names the line.
    """
    replaced = list(arguments)
    for i, (before, argument) in enumerate(pairwise(["", *arguments])):
        flag, equals, value = ("", "", argument) if before in CONFIG_FLAGS else argument.partition("=")
        if before in CONFIG_FLAGS or (equals and flag in CONFIG_FLAGS):
            path = shipped_path(value)
            read_config(path)
            _find_modules_beside(path)
            replaced[i] = f"{flag}{equals}{path}"
    return replaced


def _find_modules_beside(path: str) -> None:
    """Let a config name classes of modules in its own folder, after all other places of Python's."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isfile(path) and folder not in sys.path:
        sys.path.append(folder)


def shipped_path(path: str) -> str:
    """A path that exists is kept; otherwise ``configs/NAME`` and ``NAME`` mean the file or folder of the package.

    A path that the package does not have either is returned unchanged.
    """
    if SHIPPED is None or not path or os.path.exists(path) or os.path.isabs(path):
        return path
    found = SHIPPED / path.removeprefix("configs/")
    return str(found) if os.path.exists(found) else path


def require_one_method(paths: Sequence[str]) -> None:
    """Refuse a second overlay: each holds what differs from the defaults, so the run would mix two methods.

    Raises:
        UserError: several configs are methods.
    """
    methods = [path for path in paths if Path(path).parent.name == "methods"]
    if len(methods) > 1:
        raise UserError(
            f"config: {' and '.join(methods)} are both method overlays, and only one can be used. Give one of them, "
            "and put further values into a file of your own or into flags."
        )


def read_config(path: str) -> dict[Any, Any]:
    """Content of a config file, or of inline YAML; empty where only the parser can read it.

    Raises:
        UserError: see ``use_configs``.
    """
    if not os.path.isfile(path):
        return _inline(path)
    content = _load(Path(path))
    if not isinstance(content, dict):
        kind = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{path}: a config is a YAML mapping (keys such as trainer, model, data); this one {kind}.")
    return content


def flags_of(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Flags and their values, as argparse reads them: a word with a space is a value, and ``--`` ends the flags."""
    words = list(takewhile(lambda word: word != "--", arguments))
    for word, following in pairwise([*words, "--"]):
        key, equals, value = word.partition("=")
        if (key.startswith("--") and " " not in word) or key in CONFIG_FLAGS:
            given = value if equals else None if following.startswith("--") else following
            yield "config" if key in CONFIG_FLAGS else key[2:].removesuffix("+"), given


def keys_of(config: Mapping[Any, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a config and their values; a section comes before what is in it."""
    for name, value in config.items():
        key = f"{parent}{name}".removesuffix("+")
        yield key, value
        if isinstance(value, dict):
            yield from keys_of(value, f"{key}.")


def _inline(text: str) -> dict[Any, Any]:
    """Inline YAML; a text that is neither YAML, nor a URL, nor a file of any kind is refused."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    if isinstance(content, str) and "://" not in text and text != "-" and not os.path.exists(os.path.expanduser(text)):
        folder = "methods/" if Path(text).parent.name == "methods" else ""
        names = [path.stem for path in (SHIPPED / folder).glob("*.yaml")] if SHIPPED else []
        raise UserError(f"config: no file {text}. In configs/{folder}: {did_you_mean(Path(text).stem, names)}.")
    return content if isinstance(content, dict) else {}


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            continue
        if key in seen and key != "<<":
            raise UserError(f"line {line}: {key!r} was given on line {seen[key]} already. Keep one of them.")
        seen[key] = line
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _load(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not valid YAML in UTF-8: {reason}. Mind indents and brackets.") from error
