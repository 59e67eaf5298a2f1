"""Flags of ``egspo compare`` and of the learning-rate tuning, and their checks."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from egspo_lightning.cli.comparison.compared_runs import (
    Settings,
    config_values,
    method_file,
    method_names,
    num_sft_epochs,
    require_distinct,
    require_methods,
    whole_number,
)
from egspo_lightning.cli.comparison.provenance import num_cores
from egspo_lightning.cli.comparison.stored_results import require_same_comparison
from egspo_lightning.cli.config_files import flags_of, use_configs
from egspo_lightning.cli.early_answers import check_run
from egspo_lightning.cli.environment import require_writable
from egspo_lightning.cli.known_keys import find
from egspo_lightning.errors import UserError, did_you_mean

NOT_PASSED = {
    "seed_everything": "Give --seeds",
    "math_benchmark.every_n_epochs": "Give --evaluate_every",
    "trainer.default_root_dir": "Give --output",
    "trainer.logger": "Each run writes its metrics to --output",
    "ckpt_path": "Each run starts from the SFT checkpoint of its seed",
    "print_config": "egspo fit --print_config prints the config",
    "help_all": "egspo fit --help_all lists all keys",
}
"""Keys of fit that a comparison sets itself, and what to do instead."""


def flag_parser(prog: str, description: str, *, seeds: Sequence[int], output: str) -> argparse.ArgumentParser:
    """A parser with the shared flags; further flags are those of fit."""
    usage = "%(prog)s --config FILE --methods METHOD METHOD [...] [--seeds N ...] [-o FOLDER] [--KEY VALUE ...]"
    result = argparse.ArgumentParser(prog, usage, description, "All keys of fit may follow.", allow_abbrev=False)
    add = result.add_argument
    several: Any = {"nargs": "+", "action": "extend", "required": True}
    add("--config", "-c", **several, metavar="FILE", help="config of fit; a later one overrides an earlier one")
    known = f"overlay of configs/methods, or path of one of your own; known: {', '.join(method_names())}"
    add("--methods", **several, metavar="METHOD", help=known)
    shown = " ".join(map(str, seeds))
    add("--seeds", type=int, nargs="+", default=list(seeds), metavar="N", help=f"seeds; each trains SFT once ({shown})")
    add("--output", "-o", type=Path, default=Path(output), metavar="FOLDER", help=f"folder for all files ({output})")
    add("--phases", type=int, metavar="N", help="rollout batches of each run (trainer.max_epochs without SFT)")
    points = "phases between two points of the learning curve (a tenth of the run)"
    add("--evaluate_every", type=int, metavar="N", help=points)
    jobs = "runs at the same time (number of cores where trainer.accelerator is cpu, else 1)"
    add("--jobs", type=int, metavar="N", help=jobs)
    return result


def shared_settings(arguments: argparse.Namespace, flags: Sequence[str]) -> Settings:
    """Validate the flags, fill in the defaults (of ``arguments.jobs`` too), and make the output folder.

    Args:
        arguments: The flags of ``flag_parser``.
        flags: All others, which are those of fit.

    Raises:
        UserError: a value is out of range, a key is unknown, a config or method does not exist or is broken, or the
            folder holds another comparison.
    """
    for name in ("phases", "evaluate_every", "jobs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}.")
    require_methods(arguments.methods)
    _require_seeds(arguments.seeds)
    configs = [word.partition("=")[2] for word in use_configs([f"--config={path}" for path in arguments.config])]
    _require_keys(configs, arguments.methods, flags, list(vars(arguments)))
    values = config_values(configs, flags)
    phases = arguments.phases or _phases(values)
    threads = whole_number(values.get("num_threads")) or whole_number(os.environ.get("OMP_NUM_THREADS"))
    is_cpu = values.get("trainer.accelerator") == "cpu"
    num_runs = len(arguments.methods) * len(arguments.seeds)
    arguments.jobs = arguments.jobs or (min(max(num_cores() // (threads or 1), 1), num_runs) if is_cpu else 1)
    threads = threads or max(num_cores() // arguments.jobs, 1)
    evaluate_every = arguments.evaluate_every or max(phases // 10, 1)
    require_writable(arguments.output, "--output")
    shared = Settings(tuple(configs), tuple(flags), phases, evaluate_every, threads, arguments.output)
    require_same_comparison(shared)
    return shared


def _require_seeds(seeds: Sequence[int]) -> None:
    require_distinct(seeds, "--seeds")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"--seeds: {seed} must be from 0 to 2**32 - 1.")


def _require_keys(configs: Sequence[str], methods: Sequence[str], flags: Sequence[str], own: Sequence[str]) -> None:
    """Refuse unknown keys in configs, methods and flags, and keys that a comparison sets itself.

    Args:
        configs: Config files.
        methods: Names or paths of overlays.
        flags: Flags of fit.
        own: Names of the flags of the comparison.
    """
    for key, _ in flags_of(flags):
        if "." not in key and find(key)[0] is None and did_you_mean(key, own).startswith("Did"):
            raise UserError(f"--{key}: no such flag. {did_you_mean(key, own)}; or a key of fit (egspo fit --help).")
        for taken, instead in NOT_PASSED.items():
            if key == taken or key.startswith(f"{taken}."):
                raise UserError(f"--{key} cannot be given, because a comparison sets it for each run. {instead}.")
    check_run([*(f"--config={path}" for path in [*configs, *map(method_file, methods)]), *flags])
    for method in methods:
        _require_method_kept(method, [key for key, _ in flags_of(flags)])


def _require_method_kept(method: str, keys: Sequence[str]) -> None:
    """Refuse flags that would override what a method sets: the compared runs would no longer differ in it."""
    values = config_values([method_file(method)])
    ours = [_without_class(key) for key, value in values.items() if not isinstance(value, dict)]
    for key in keys:
        given = _without_class(key)
        if any(f"{own}.".startswith(f"{given}.") or f"{given}.".startswith(f"{own}.") for own in ours):
            raise UserError(
                f"--{key} would override a value of the method {method}. Leave it out, or put it into an overlay of "
                "your own and give its path to --methods."
            )


def _without_class(key: str) -> str:
    """A key without the words that a flag may leave out."""
    return key.replace(".init_args", "").replace(".class_path", "")


def _phases(values: dict[str, Any]) -> int:
    """Rollout batches of a run of fit with these values."""
    max_epochs, num_sft = whole_number(values.get("trainer.max_epochs")), num_sft_epochs(values)
    if max_epochs is None or num_sft is None:
        name = "trainer.max_epochs" if max_epochs is None else "stage_transition.after_epochs"
        raise UserError(f"--phases must be given, the number of rollout batches: the config sets no {name}.")
    if max_epochs <= num_sft:
        raise UserError(
            f"trainer.max_epochs = {max_epochs} leaves no rollout batch after {num_sft} epochs of SFT "
            "(stage_transition.after_epochs). Raise it, or give --phases."
        )
    return max_epochs - num_sft
