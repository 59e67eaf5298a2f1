"""Looks at config files before the parser does, which names neither a broken file nor a key that is there twice."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from egspo_lightning.errors import UserError

CONFIG_FLAGS = ("--config", "-c")


def require_readable(arguments: Sequence[str]) -> None:
    """Refuse config files that are no YAML mapping, or give a key twice: the parser would silently take the latter.

    What is no file is left to the parser, which takes YAML in place of a path and names what it does not find.

    Raises:
        UserError: naming the file and, where there is one, the line.
    """
    for path in config_paths(arguments):
        if not path.is_file():
            continue
        content = _load(path)
        if not isinstance(content, dict):
            kind = "is empty" if content is None else f"holds a {type(content).__name__}"
            raise UserError(f"{path}: a config is a YAML mapping (keys such as trainer, model, data); this one {kind}.")


def config_paths(arguments: Sequence[str]) -> Iterator[Path]:
    """The values of ``--config VALUE``, ``--config=VALUE`` and ``-c VALUE``."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag in CONFIG_FLAGS and len(value) < 4096:
            yield Path(value)
        elif flag.startswith("--config=") and len(flag) < 4096:
            yield Path(flag.removeprefix("--config="))


class _Loader(yaml.SafeLoader):
    """Refuses a mapping in which a key stands twice."""


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
