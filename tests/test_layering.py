"""Imports go downward only; the rules are those of the README's tree."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "egspo_lightning"
NAME = PACKAGE.name

# Lowest first. A module may import from lower layers and from its own folder, never from a neighbour in its layer.
LAYERS = [
    ["errors"],
    ["types", "jsonl", "flags", "lora", "packing", "randomness"],
    ["loops", "cut_off", "checkpoint_files", "checkpoint_fit"],
    ["config_files", "surroundings", "optimizers", "ranks", "noise"],
    ["ops", "rewards", "tasks", "checkpoints", "plain"],
    ["controllers", "answers", "evaluation.metrics", "passes"],
    ["admission"],
    ["rows"],
    ["data", "rollout", "evaluation", "policy", "analysis"],
    ["critic", "sharding", "answering", "updates"],
    ["phases"],
    ["strategies", "planning", "faults", "networks"],
    ["snapshot"],
    ["policy_module"],
    ["resumable_module"],
    ["module", "datamodule", "trainer"],
    ["callbacks", "exits", "plan_command", "parser"],
    ["replaying", "resumption"],
    ["cli"],
    ["__main__"],
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def home(module: str) -> str:
    """The entry of LAYERS that a module belongs to, the longest that fits."""
    fits = [entry for layer in LAYERS for entry in layer if module == entry or module.startswith(f"{entry}.")]
    assert fits, f"{module} stands in no layer: give it one"
    return max(fits, key=len)


def level(entry: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if entry in layer)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """The modules of this package that a file imports, without the package's name."""
    return {name.removeprefix(f"{NAME}.") for name in imports(path) if name.startswith(f"{NAME}.")}


def reached(path: Path) -> set[str]:
    """The modules of this package that a file imports, or that those import, and so on."""
    by_name = {dotted(file): file for file in FILES}
    found, waiting = set(), [path]
    while waiting:
        for name in ours(waiting.pop()) & by_name.keys() - found:
            found.add(name)
            waiting.append(by_name[name])
    return found


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def files_of(*entries: str) -> list[Path]:
    chosen = [path for path in FILES if home(dotted(path)) in entries]
    assert chosen
    return chosen


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_go_down(path):
    mine = home(dotted(path))
    for name in ours(path):
        theirs = home(name)
        assert theirs == mine or level(theirs) < level(mine), f"{dotted(path)} must not import {name}"


@pytest.mark.parametrize("path", files_of("ops"), ids=dotted)
def test_ops_import_torch_alone(path):
    assert top_level(path) <= {"torch", NAME, "math", "collections", "dataclasses", "typing", "itertools", "time"}
    assert not any(name.startswith("torch.distributed") for name in imports(path))


@pytest.mark.parametrize("path", files_of("rewards", "errors", "jsonl", "tasks", "answers", "rows"), ids=dotted)
def test_text_needs_no_torch(path):
    assert not top_level(path) & {"torch", "lightning", "transformers"}


@pytest.mark.parametrize("path", files_of("rollout"), ids=dotted)
def test_sampling_does_not_know_what_it_is_for(path):
    """Of the tensor functions it needs those that pad, count and score, directly or by way of others."""
    known = {name for name in reached(path) if name.startswith("ops.")}
    assert known <= {"ops.masking", "ops.padding", "ops.token_stats"}


def test_only_the_upper_layers_import_lightning():
    lower_callers = ("strategies", "policy_module", "resumable_module", "module", "datamodule", "trainer")
    upper = (*lower_callers, "callbacks", "exits", "plan_command", "parser", "replaying", "resumption", "cli")
    for path in FILES:
        if home(dotted(path)) not in upper:
            assert "lightning" not in top_level(path), dotted(path)


def test_plots_and_data_frames_are_the_analysis_own():
    """They are optional to install; training writes records without them."""
    for path in FILES:
        if home(dotted(path)) != "analysis":
            assert not top_level(path) & {"matplotlib", "pandas"}, dotted(path)
    assert reached(PACKAGE / "analysis" / "schema.py") == set()
    assert top_level(PACKAGE / "analysis" / "schema.py") <= {"pathlib", "pyarrow"}


NETWORKS = {
    "resumable_module",
    "policy_module",
    "snapshot",
    "networks",
    "policy",
    "critic",
    "checkpoints",
    "sharding",
    "lora",
    "strategies",
}


@pytest.mark.parametrize("part", ["module", "faults", *sorted(NETWORKS)])
def test_the_module_reads_no_text(part):
    """Nor does anything that it is made of."""
    forbidden = {
        "data",
        "rollout",
        "rewards",
        "evaluation",
        "datamodule",
        "answering",
        "phases",
        "answers",
        "rows",
        "jsonl",
    }
    assert not {name.split(".")[0] for name in reached(PACKAGE / f"{part}.py")} & forbidden


@pytest.mark.parametrize("part", ["datamodule", "answering", "phases"])
def test_the_data_know_the_policy_by_its_protocol_alone(part):
    networks = {"module", *NETWORKS}
    assert not {name.split(".")[0] for name in reached(PACKAGE / f"{part}.py")} & networks


def test_training_and_benchmark_sources_share_no_loader():
    for path in files_of("data"):
        assert not any(name.startswith(f"{NAME}.evaluation") for name in imports(path))
    for path in files_of("evaluation", "evaluation.metrics"):
        assert not any(name.startswith(f"{NAME}.data") for name in imports(path))


def test_the_package_itself_imports_nothing():
    assert imports(PACKAGE / "__init__.py") == set()
