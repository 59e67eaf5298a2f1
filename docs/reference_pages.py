"""MkDocs hook: replace ``[[modules NAME]]`` in a page by the reference of all public modules of that package."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def public_modules(package: str) -> list[str]:
    """Return the public modules of a package, sorted by name; a leading underscore marks a private module."""
    folder = ROOT / Path(*package.split("."))
    return [f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]


def on_page_markdown(markdown: str, **_others: Any) -> str:
    """Insert the modules."""
    before, mark, rest = markdown.partition("[[modules ")
    if not mark:
        return markdown
    package, _, after = rest.partition("]]")
    return before + "\n\n".join(f"::: {module}" for module in public_modules(package)) + after
