"""Import layers: a module imports only from lower layers, as in the README's tree."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "egspo_lightning"
NAME = PACKAGE.name

# Lowest first. A module may import from lower layers and from its own room, but not from other rooms in its layer.
LAYERS = [
    ["errors", "types", "chat_turns"],
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


def room(module: str) -> str:
    """The longest entry of LAYERS that contains the module."""
    fits = [entry for layer in LAYERS for entry in layer if module == entry or module.startswith(f"{entry}.")]
    assert fits, f"{module} is in no layer: add it to LAYERS"
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


def package_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, without the package's name."""
    return {name.removeprefix(f"{NAME}.") for name in imports(path) if name.startswith(f"{NAME}.")}


def transitive_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports directly or indirectly."""
    by_name = {dotted(file): file for file in FILES}
    found, waiting = set(), [path]
    while waiting:
        for name in package_imports(waiting.pop()) & by_name.keys() - found:
            found.add(name)
            waiting.append(by_name[name])
    return found


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def files_of(*entries: str) -> list[Path]:
    chosen = [path for path in FILES if room(dotted(path)) in entries]
    assert chosen
    return chosen


def test_package_has_few_top_level_modules_and_layers():
    """The top level holds only the modules that a user reads first."""
    top = {path.name for path in PACKAGE.glob("*.py")}
    assert top == {"__init__.py", "__main__.py", "module.py", "datamodule.py", "types.py", "errors.py", "chat_turns.py"}
    assert len(LAYERS) <= 11


def test_module_names_are_unique():
    names = [path.stem for path in FILES if not path.stem.startswith("__")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_point_to_lower_layers(path):
    mine = room(dotted(path))
    for name in package_imports(path):
        theirs = room(name)
        is_base = {mine, theirs} == {"types", "errors"} and mine == "types"
        assert theirs == mine or is_base or level(theirs) < level(mine), f"{dotted(path)} must not import {name}"


@pytest.mark.parametrize("path", files_of("ops"), ids=dotted)
def test_ops_import_only_torch_and_standard_library(path):
    assert top_level(path) <= {
        "torch",
        NAME,
        "abc",
        "math",
        "collections",
        "dataclasses",
        "typing",
        "itertools",
        "time",
    }
    assert not any(name.startswith("torch.distributed") for name in imports(path))


TEXT_MODULES = [
    *files_of("rewards", "errors"),
    *(PACKAGE / "data" / "tasks").glob("*.py"),
    *(PACKAGE / "data" / f"{name}.py" for name in ("answer_formats", "rows", "reader")),
]


@pytest.mark.parametrize("path", TEXT_MODULES, ids=dotted)
def test_text_modules_do_not_import_torch(path):
    assert not top_level(path) & {"torch", "lightning", "transformers"}


@pytest.mark.parametrize("path", files_of("rollout"), ids=dotted)
def test_rollout_imports_only_batching_and_scoring_ops(path):
    """It reaches only ops that batch, pad, mask and compute token statistics."""
    known = {name.removeprefix("ops.") for name in transitive_imports(path) if name.startswith("ops.")}
    token_stats = {"token_stats", "token_stats_backward", "logit_tiles"}
    assert known <= {"batching", "masking", *token_stats}


def test_only_the_upper_layers_import_lightning():
    upper = ("training", "module", "datamodule", "callbacks", "cli", "__main__")
    for path in FILES:
        if room(dotted(path)) not in upper:
            assert "lightning" not in top_level(path), dotted(path)


def test_only_analysis_imports_matplotlib_pandas_and_plotly():
    """Matplotlib is optional, and the others are slow to import. Training writes token records without them."""
    for path in FILES:
        if room(dotted(path)) != "analysis":
            assert not top_level(path) & {"matplotlib", "pandas", "plotly"}, dotted(path)
    schema = PACKAGE / "analysis" / "record_schema.py"
    assert transitive_imports(schema) == set()
    assert top_level(schema) <= {"pathlib", "pyarrow"}


def test_report_needs_no_torch():
    """``egspo report`` answers in a second or two."""
    path = PACKAGE / "cli" / "report_command.py"
    reached = [path, *(PACKAGE / f"{name.replace('.', '/')}.py" for name in transitive_imports(path))]
    assert PACKAGE / "analysis" / "report_page.py" in reached
    assert not {name for file in reached for name in top_level(file)} & {
        "torch",
        "lightning",
        "transformers",
        "matplotlib",
    }


@pytest.mark.parametrize("path", files_of("analysis"), ids=dotted)
def test_analysis_imports_only_types_and_errors(path):
    assert {room(name) for name in package_imports(path)} <= {"analysis", "types", "errors"}


@pytest.mark.parametrize("path", [PACKAGE / "module.py", *files_of("models")], ids=dotted)
def test_module_and_models_do_not_reach_data_or_rewards(path):
    """Directly or indirectly."""
    forbidden = {"data", "rollout", "rewards", "evaluation", "datamodule"}
    assert not {name.split(".")[0] for name in transitive_imports(path)} & forbidden


@pytest.mark.parametrize("part", ["datamodule", "evaluation/answerer", "training/rollout_phase"])
def test_data_and_rollouts_reach_no_policy_implementation(part):
    known = transitive_imports(PACKAGE / f"{part}.py")
    assert "module" not in known
    assert not [name for name in known if name.startswith("models.") and not name.startswith("models.lora")]


def test_data_does_not_import_evaluation():
    """Training sources and benchmarks share a row reader but no class, so a config cannot train on a benchmark."""
    for path in files_of("data"):
        assert not any(name.startswith(f"{NAME}.evaluation") for name in imports(path))


def test_package_init_imports_only_the_standard_library():
    assert top_level(PACKAGE / "__init__.py") <= {"ast", "importlib", "pkgutil", "typing"}
