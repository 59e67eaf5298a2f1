"""Entropy-gated hybrid SFT + RL training of language models for mathematical reasoning.

The public names stand in ``__init__.pyi``. Each is imported when it is first used, so that the grader's worker
processes can import the package without torch. Configs and flags may give the classes among them by name alone.
"""

import ast
import importlib
import pkgutil
from typing import Any

__version__ = "0.1.0"

_STUB = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"")
_MODULES = {name.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for name in node.names}
"""Public name to the module that defines it."""
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
