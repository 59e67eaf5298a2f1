"""Results of finished runs on disk, and the check that they belong to this comparison."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egspo_lightning.cli.comparison.compared_runs import Run, Settings, shared_values
from egspo_lightning.errors import UserError


def read_result(run: Run, shared: Settings) -> dict[str, Any] | None:
    """Read the result of a run; None if the run has not finished.

    Raises:
        UserError: the result was made with other settings.
    """
    path = run.result_file(shared.output)
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    _require_same(result["settings"], run.settings(shared), path)
    return result


def require_same_comparison(shared: Settings) -> None:
    """Refuse a folder that holds runs of another comparison, of whatever methods and seeds.

    Raises:
        UserError: naming the settings that differ.
    """
    ours = shared_values(shared) | {"phases": shared.phases, "evaluate_every": shared.evaluate_every}
    stored: dict[str, Any] = {}
    for path in sorted(shared.output.glob("runs/*/*.json")):  # those of SFT do not hold all settings
        stored = json.loads(path.read_text())["settings"] | stored
    both = ours.keys() & stored.keys()
    _require_same({key: stored[key] for key in both}, {key: ours[key] for key in both}, shared.output)


def _require_same(stored: Any, ours: Any, path: Path) -> None:
    differing = differences(stored, json.loads(json.dumps(ours)))
    if differing:
        raise UserError(
            f"--output: {path} was made with other settings: {'; '.join(differing)}. Use those settings, use "
            "another --output, or delete the old results."
        )


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """List the differences between two settings as "key: stored OLD, now NEW"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new})
        pairs = [(f"{name}.{key}" if name else str(key), old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{name}: stored {_brief(old)}, now {_brief(new)}"]
    return [line for key, a, b in pairs for line in differences(a, b, key)]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
