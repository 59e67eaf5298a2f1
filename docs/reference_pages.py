"""A hook of MkDocs: ``[[modules NAME]]`` in a page becomes the reference of all public modules of that package."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def public_modules(package: str) -> list[str]:
    """The modules right in a package, by name; those that begin with an underscore are not public."""
    folder = ROOT / Path(*package.split("."))
    return [f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]


def on_page_markdown(markdown: str, **_others: Any) -> str:
    """Put the modules in their place."""
    before, mark, rest = markdown.partition("[[modules ")
    if not mark:
        return markdown
    package, _, after = rest.partition("]]")
    return before + "\n\n".join(f"::: {module}" for module in public_modules(package)) + after
