"""Where things are, and small real components that many tests share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_model() -> str:
    return str(REPOSITORY / "configs" / "tiny_model")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real benchmark data, kept beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs the reference data in {SHARED / 'data'}")
    return SHARED / "data"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], list[dict[str, Any]]]:
    """Cases of the field's reference implementations, kept beside the checkout."""

    def load(name: str) -> list[dict[str, Any]]:
        path = SHARED / "golden" / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"needs the reference values in {path}")
        cases: list[dict[str, Any]] = json.loads(path.read_text())["cases"]
        assert cases
        return cases

    return load
