"""Config files on the command line: those shipped with the package, and checks that name a broken file and its line."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

import egspo_lightning
from egspo_lightning.errors import UserError

CONFIG_FLAGS = ("--config", "-c")
_PACKAGE = Path(egspo_lightning.__file__).parent
SHIPPED = next((root for root in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if root.is_dir()), None)
"""The folder configs: package data of an installed wheel, or the one of the checkout."""


def use_shipped_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments, with ``shipped_path`` applied to each ``--config``."""
    replaced = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        flag, equals, value = argument.partition("=")
        if before in CONFIG_FLAGS:
            replaced.append(shipped_path(argument))
        else:
            replaced.append(f"{flag}={shipped_path(value)}" if equals and flag in CONFIG_FLAGS else argument)
    return replaced


def shipped_path(path: str) -> str:
    """A path that exists is kept; otherwise ``configs/NAME`` and ``NAME`` mean the file or folder of the package.

    A path that the package does not have either is returned unchanged.
    """
    if SHIPPED is None or os.path.exists(path) or os.path.isabs(path) or len(path) > 255:
        return path
    found = SHIPPED / path.removeprefix("configs/")
    return str(found) if path and os.path.exists(found) else path


def require_readable(arguments: Sequence[str]) -> None:
    """Refuse config files that are not YAML mappings, or that give a key twice: the parser would keep the last one.

    The parser handles values that are not files: it accepts inline YAML, and names a file that does not exist.

    Raises:
        UserError: a file is refused; the message names it and the line.
    """
    for path in config_paths(arguments):
        if not path.is_file():
            continue
        content = _load(path)
        if not isinstance(content, dict):
            kind = "is empty" if content is None else f"holds a {type(content).__name__}"
            raise UserError(f"{path}: a config is a YAML mapping (keys such as trainer, model, data); this one {kind}.")


def config_paths(arguments: Sequence[str]) -> Iterator[Path]:
    """Values of ``--config VALUE``, ``--config=VALUE`` and ``-c VALUE``."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag in CONFIG_FLAGS and len(value) < 4096:
            yield Path(value)
        elif flag.startswith("--config=") and len(flag) < 4096:
            yield Path(flag.removeprefix("--config="))


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if isinstance(key_node, yaml.ScalarNode) and key in seen and key != "<<":
            raise UserError(f"line {line}: {key!r} was given on line {seen[key]} already. Keep one of them.")
        if isinstance(key_node, yaml.ScalarNode):
            seen[key] = line
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _load(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 ({error.reason} at byte {error.start}). Re-encode it.") from error
    except yaml.YAMLError as error:
        raise UserError(
            f"{path}: not valid YAML: {' '.join(str(error).split())}. Mind indents and brackets."
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply to be a config.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
