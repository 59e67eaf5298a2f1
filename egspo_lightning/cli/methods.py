"""Method overlays: the list that ``egspo methods`` prints, from the head of each file."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from egspo_lightning.cli.config_files import SHIPPED


class Method(NamedTuple):
    """Head of an overlay: a sentence, and the lines that begin with ``Formula:`` and ``Source:``."""

    name: str
    purpose: str
    formula: str
    source: str


def shipped_methods() -> list[Method]:
    """The overlays in ``configs/methods``, by name."""
    return [] if SHIPPED is None else [_head(path) for path in sorted((SHIPPED / "methods").glob("*.yaml"))]


def methods_table() -> str:
    """Name, purpose, formula and source of each overlay, and the command that uses one."""
    methods = shipped_methods()
    width = max(len(method.name) for method in methods)
    lines = [line for method in methods for line in _lines(method, width)]
    return "\n".join([*lines, "", "Use one: egspo fit --config CONFIG --config configs/methods/NAME.yaml"])


def _lines(method: Method, width: int) -> Iterator[str]:
    yield f"{method.name:<{width}}  {method.purpose}"
    yield f"{'':<{width}}  {method.formula}"
    yield f"{'':<{width}}  Source: {method.source}"


def _head(path: Path) -> Method:
    comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    named = {name: text.strip() for name, _, text in (line.partition(":") for line in comments[1:])}
    return Method(path.stem, comments[0], named["Formula"], named["Source"])
