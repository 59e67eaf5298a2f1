"""Config keys and class names, read from source text: a typo is answered before torch is imported.

The keys are never stricter than the parser. Where a signature cannot be read here, any key may follow.
"""

import ast
import difflib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeGuard

import egspo_lightning

SECTIONS = {
    "trainer": "lightning.pytorch.trainer.trainer.Trainer",
    "model": "egspo_lightning.module.EGSPOModule",
    "data": "egspo_lightning.datamodule.HybridDataModule",
    "checkpoint": "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
}
"""Config section to the class whose arguments it holds."""

CALLBACKS = {
    # MathBenchmark comes before StageTransition, which may read its metrics at the end of an epoch
    "math_benchmark": "MathBenchmark",
    "stage_transition": "StageTransition",
    "dashboard": "Dashboard",
    "entropy_histogram": "EntropyHistogram",
    "guards": "Guards",
    "token_records": "TokenRecords",
    "rollout_samples": "RolloutSamples",
    "checkpoint": "PhaseCheckpoint",
    "hf_export": "HFExport",
    "predictions": "PredictionWriter",
    "progress": "PhaseProgress",
    "interruption": "Interruption",  # last: it stops the run after all others have written their files
}
"""Config section to callback. An argument of its own, or Lightning's flag for its kind, can switch each off."""

OF_LIGHTNING = ("config", "help", "print_config", "seed_everything")
"""Keys that LightningCLI adds to each subcommand."""
OF_THE_PARSER = ("class_path", "init_args", "dict_kwargs", "help")
"""Words that jsonargparse accepts after any key."""
OTHER_NAMES = {"learning_rate": "lr", "epochs": "max_epochs", "num_train_epochs": "max_epochs"}
OF_THE_OPTIMIZER = ("model.optimizer.lr", "model.optimizer.weight_decay")


class Keys(NamedTuple):
    """The keys and the kind of class that may stand below a config key."""

    below: dict[str, "Keys"] | None = None
    """None where any key may follow."""
    kind: str | None = None
    """Protocol or base class of the value, which names a class."""


Found = tuple[ast.ClassDef, str]
"""A class, and the module that defines it."""


@cache
def known_keys() -> Keys:
    """The tree of config keys of all subcommands."""
    paths = {key: f"{egspo_lightning._MODULES[name]}.{name}" for key, name in CALLBACKS.items()} | SECTIONS
    classes = {key: path.rpartition(".") for key, path in paths.items()}
    sections = {key: _keys_of(name, module) for key, (module, _, name) in classes.items()}
    return Keys(dict.fromkeys([*OF_LIGHTNING, *_added_flags(), *_function_arguments()], Keys()) | sections)


def find(key: str) -> tuple[Keys | None, str]:
    """Find the node below a key (None if the key is unknown), and the longest known key that contains it."""
    node, parent = known_keys(), ""
    for part in key.split("."):
        if node.below is None or part in OF_THE_PARSER or part.startswith("$"):
            return Keys(), parent
        if part not in node.below:
            return None, parent
        node, parent = node.below[part], f"{parent}.{part}".lstrip(".")
    return node, parent


def similar_keys(key: str, parent: str) -> list[str]:
    """Known keys with the same last word; else the most similar one in the section; else those with a similar word.

    Args:
        key: an unknown key
        parent: the section that contains it, from ``find``
    """
    last, by_word = key.rpartition(".")[2], dict[str, list[str]]()
    for name in [*_all_keys(known_keys()), *OF_THE_OPTIMIZER]:
        by_word.setdefault(name.rpartition(".")[2], []).append(name)
    siblings = find(parent)[0] if parent else known_keys()
    near = difflib.get_close_matches(last, (siblings and siblings.below) or (), n=1)
    far = difflib.get_close_matches(last, by_word, n=1)
    same = [name for word in (OTHER_NAMES.get(last), last) for name in by_word.get(word or "", ())]
    return (same or [f"{parent}.{word}".lstrip(".") for word in near] or [n for word in far for n in by_word[word]])[:3]


@cache
def classes_of(kind: str) -> dict[str, str]:
    """Names of the public classes of a kind that can be built, each with the first line of its docstring."""
    found = {name: _find(name, module) for name, module in egspo_lightning._MODULES.items()}
    return {
        name: (ast.get_docstring(each[0]) or "").partition("\n")[0].replace("``", "")
        for name, each in found.items()
        if each is not None and _derives(each, kind) and not _is_abstract(each[0])
    }


def _all_keys(node: Keys, parent: str = "") -> Iterator[str]:
    for name, below in (node.below or {}).items():
        yield parent + name
        yield from _all_keys(below, f"{parent}{name}.")


def _added_flags() -> Iterator[str]:
    """Flags that the command line adds by ``add_argument``."""
    for node in ast.walk(_source("egspo_lightning.cli.main")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [word.value for word in node.args if isinstance(word, ast.Constant)]
            yield from (name[2:] for name in names if isinstance(name, str) and name.startswith("--"))


def _function_arguments() -> list[str]:
    """Arguments of the functions that subcommands call: Trainer's methods and ``plan_run``."""
    trainer, plan = SECTIONS["trainer"].rpartition(".")[0], "egspo_lightning.cli.plan"
    functions = [node for module in (trainer, plan) for node in ast.walk(_source(module)) if _is_command(node)]
    arguments = [argument.arg for node in functions for argument in [*node.args.args, *node.args.kwonlyargs]]
    return [name for name in arguments if name not in ("self", "flags") and not name.endswith(("loaders", "module"))]


def _is_command(node: ast.AST) -> TypeGuard[ast.FunctionDef]:
    return isinstance(node, ast.FunctionDef) and node.name in ("fit", "validate", "test", "predict", "plan_run")


@cache
def _source(module: str) -> ast.Module:
    """Syntax tree of a module, which is not imported; empty if its file is not found."""
    root, *parts = module.split(".")
    spec = find_spec(root)
    folders = list((spec and spec.submodule_search_locations) or [])
    path = Path(*folders[:1], *parts).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8") if folders and path.is_file() else "")


def _find(name: str, module: str) -> Found | None:
    """The class that a name means in a module."""
    for node in _source(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, module
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            return _find(name, node.module or "") if f"{node.module}".startswith("egspo_lightning.") else None
    return None


def _keys_of(name: str, module: str) -> Keys:
    found = _find(name, module)
    arguments = None if found is None else _arguments(found[0])
    if found is None or arguments is None:
        return Keys()
    return Keys({name: _keys_at(annotation, found[1]) for name, annotation in arguments.items()})


def _keys_at(annotation: ast.expr | None, module: str) -> Keys:
    """Keys below an argument: those of the one class in its annotation, if that class has no subclasses."""
    names = [node.id for node in ast.walk(annotation or ast.Constant(None)) if isinstance(node, ast.Name)]
    classes = [found for name in names if (found := _find(name, module)) is not None]
    if len(classes) != 1:
        return Keys()
    definition, home = classes[0]
    if _is_abstract(definition):
        return Keys(kind=definition.name)
    return _keys_of(definition.name, home) if _is_plain_dataclass(definition) else Keys()


def _arguments(definition: ast.ClassDef) -> dict[str, ast.expr | None] | None:
    """Constructor arguments and their annotations; None where they cannot be read from this class alone."""
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            is_open = node.args.vararg or node.args.kwarg
            given = [*node.args.args[1:], *node.args.kwonlyargs]
            return None if is_open else {argument.arg: argument.annotation for argument in given}
    if not _is_plain_dataclass(definition):
        return None
    fields = [(node.target, node.annotation) for node in definition.body if isinstance(node, ast.AnnAssign)]
    return {name.id: annotation for name, annotation in fields if isinstance(name, ast.Name) and name.id[0] != "_"}


def _is_plain_dataclass(definition: ast.ClassDef) -> bool:
    return not definition.bases and any("dataclass" in ast.unparse(node) for node in definition.decorator_list)


def _is_abstract(definition: ast.ClassDef) -> bool:
    bases = {ast.unparse(base) for base in definition.bases}
    return bool(bases & {"Protocol", "ABC"}) or "@abstractmethod" in ast.unparse(definition)


def _derives(found: Found, kind: str) -> bool:
    definition, module = found
    bases = [_find(ast.unparse(base), module) for base in definition.bases]
    return definition.name == kind or any(base is not None and _derives(base, kind) for base in bases)
