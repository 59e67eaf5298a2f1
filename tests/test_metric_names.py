"""The metrics table in the docs lists exactly the metrics that the package logs."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "egspo_lightning"
FAMILIES = ("loss", "policy", "value", "gate", "rollout", "update", "fault", "time")
"""Families whose names are literals; the names of ``eval/*``, ``guard/*`` and ``entropy/*`` are composed."""
NAME = re.compile(rf"(?:{'|'.join(FAMILIES)})/[a-z_/]+(?:<[a-z]+>)?")


def literals(path: Path) -> set[str]:
    """Metric names in a module; ``rollout/reward/{name}`` is ``rollout/reward/<term>``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.add("".join(part.value if isinstance(part, ast.Constant) else "<term>" for part in node.values))
    return {name for name in found if NAME.fullmatch(name) and not name.endswith("/")}


def logged() -> set[str]:
    return {name for path in PACKAGE.rglob("*.py") for name in literals(path)} - {"rollout/samples"}  # a text


def documented(repository: Path) -> set[str]:
    page = (repository / "docs" / "guides" / "metrics.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell) if NAME.fullmatch(name)}


def test_metrics_table_lists_exactly_the_logged_metrics(repository):
    assert documented(repository) == logged()


def test_index_of_metric_families_lists_their_modules():
    """The docstring of ``ops.diagnostics`` lists the modules that name each family's metrics."""
    text = ast.get_docstring(ast.parse((PACKAGE / "ops" / "diagnostics.py").read_text(encoding="utf-8"))) or ""
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    index = {family: line for line in lines for family in re.findall(r"``([a-z]+)/\*``", line)}
    for family in FAMILIES:
        modules = {
            ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            for path in PACKAGE.rglob("*.py")
            if path.relative_to(PACKAGE).parts[0] not in ("callbacks", "analysis", "cli")  # these read logged metrics
            and path.stem != "callback_rules"  # so does this one
            and any(name.startswith(f"{family}/") for name in literals(path))
        }
        assert set(re.findall(r"``([a-z_.]+)``", index[family])) == modules, family
