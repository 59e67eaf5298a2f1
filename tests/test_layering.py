"""Imports go downward only; the rules are those of the README's tree."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "egspo_lightning"
NAME = PACKAGE.name

# Lowest first. A module may import from lower layers and from its own room, never from a neighbor in its layer.
LAYERS = [
    ["errors", "types"],
    ["ops", "rewards", "analysis"],
    ["models", "data"],
    ["checkpointing"],
    ["rollout"],
    ["evaluation"],
    ["training"],
    ["module", "datamodule"],
    ["callbacks"],
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


def test_the_house_has_few_rooms():
    """The top of the package holds what a user sees first, and nothing else."""
    top = {path.name for path in PACKAGE.glob("*.py")}
    assert top == {"__init__.py", "__main__.py", "module.py", "datamodule.py", "types.py", "errors.py"}
    assert len(LAYERS) <= 11


def test_no_two_modules_have_one_name():
    names = [path.stem for path in FILES if not path.stem.startswith("__")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_go_down(path):
    mine = home(dotted(path))
    for name in ours(path):
        theirs = home(name)
        is_base = {mine, theirs} == {"types", "errors"} and mine == "types"
        assert theirs == mine or is_base or level(theirs) < level(mine), f"{dotted(path)} must not import {name}"


@pytest.mark.parametrize("path", files_of("ops"), ids=dotted)
def test_ops_import_torch_alone(path):
    assert top_level(path) <= {"torch", NAME, "math", "collections", "dataclasses", "typing", "itertools", "time"}
    assert not any(name.startswith("torch.distributed") for name in imports(path))


TEXT = [
    *files_of("rewards", "errors"),
    *(PACKAGE / "data" / "tasks").glob("*.py"),
    *(PACKAGE / "data" / f"{name}.py" for name in ("answer_formats", "rows", "reader")),
]


@pytest.mark.parametrize("path", TEXT, ids=dotted)
def test_text_needs_no_torch(path):
    assert not top_level(path) & {"torch", "lightning", "transformers"}


@pytest.mark.parametrize("path", files_of("rollout"), ids=dotted)
def test_sampling_does_not_know_what_it_is_for(path):
    """It reaches only the pure functions that batch, pad, count and score."""
    known = {name.removeprefix("ops.") for name in reached(path) if name.startswith("ops.")}
    token_stats = {"token_stats", "token_stats_backward", "logit_tiles"}
    assert known <= {"batching", "masking", "padding", *token_stats}


def test_only_the_upper_layers_import_lightning():
    upper = ("training", "module", "datamodule", "callbacks", "cli", "__main__")
    for path in FILES:
        if home(dotted(path)) not in upper:
            assert "lightning" not in top_level(path), dotted(path)


def test_plots_and_data_frames_are_the_analysis_own():
    """They are optional to install; training writes records without them."""
    for path in FILES:
        if home(dotted(path)) != "analysis":
            assert not top_level(path) & {"matplotlib", "pandas"}, dotted(path)
    schema = PACKAGE / "analysis" / "record_schema.py"
    assert reached(schema) == set()
    assert top_level(schema) <= {"pathlib", "pyarrow"}


@pytest.mark.parametrize("path", files_of("analysis"), ids=dotted)
def test_analysis_stands_beside_the_rest(path):
    assert {home(name) for name in ours(path)} <= {"analysis", "types", "errors"}


@pytest.mark.parametrize("path", [PACKAGE / "module.py", *files_of("models")], ids=dotted)
def test_the_module_reads_no_text(path):
    """Nor does anything that it is made of."""
    forbidden = {"data", "rollout", "rewards", "evaluation", "datamodule"}
    assert not {name.split(".")[0] for name in reached(path)} & forbidden


@pytest.mark.parametrize("part", ["datamodule", "evaluation/answerer", "training/rollout_phase"])
def test_the_data_know_the_policy_by_its_protocol_alone(part):
    known = reached(PACKAGE / f"{part}.py")
    assert "module" not in known
    assert not [name for name in known if name.startswith("models.") and name != "models.lora"]


def test_training_data_and_benchmarks_share_no_source():
    """They may share a reader of rows, never an instance: a benchmark cannot be trained on by a slip of the config."""
    for path in files_of("data"):
        assert not any(name.startswith(f"{NAME}.evaluation") for name in imports(path))


def test_the_package_itself_imports_the_standard_library_alone():
    assert top_level(PACKAGE / "__init__.py") <= {"ast", "importlib", "pkgutil", "typing"}
