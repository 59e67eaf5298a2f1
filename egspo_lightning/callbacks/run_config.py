"""RunConfig: saves the config in log folder and checkpoints, and prints the fields that a resumed run changes."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

KEY = "egspo_config"
NOT_TRAINING = ("ckpt_path", "weights_only", "trainer.default_root_dir")
"""Fields that say where a run is, not what it trains."""
HYPERPARAMETERS = ("seed_everything", "model", "data", "stage_transition")
"""Sections of the config that are hyperparameters as a whole, but for ``ONLY_EVALUATION``."""
ONLY_EVALUATION = ("benchmarks", "eval_batch_size", "evaluation_grader", "predict_sampling")
"""Keys of ``data`` that are left out."""
TRAINER_HYPERPARAMETERS = (
    "max_epochs",
    "max_steps",
    "precision",
    "strategy",
    "devices",
    "num_nodes",
    "accumulate_grad_batches",
    "gradient_clip_val",
)
"""Keys of ``trainer`` that are hyperparameters."""


class RunConfig(SaveConfigCallback):
    """Lightning's SaveConfigCallback that also writes the config, as plain data, into each checkpoint.

    A resumed run uses its own values, and prints each that differs from the checkpoint's.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml``; checkpoints get the same values."""
        super().setup(trainer, pl_module, stage)
        self.values = plain(self.parser, self.config)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the config into the checkpoint."""
        checkpoint[KEY] = self.values

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Print the fields that a resumed run changes; an evaluation takes only the weights from the checkpoint."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if KEY not in checkpoint:
            rank_zero_info("The checkpoint holds no config, so changes since then cannot be listed.")
            return
        changed = differences(checkpoint[KEY], self.values)
        if changed:
            rank_zero_info("\n  ".join(["Changed since the checkpoint; this run uses its own values:", *changed]))


def plain(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """A config as in ``config.yaml``: numbers, strings, lists and dictionaries alone, which ``weights_only`` loads."""
    return yaml.safe_load(parser.dump(config, skip_none=False))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``field: old -> new`` for every field in which two configs differ, in alphabetical order."""
    old, new = dict(flatten(before)), dict(flatten(now))
    names = sorted((old.keys() | new.keys()).difference(NOT_TRAINING))
    shown = ((name, old.get(name, "absent"), new.get(name, "absent")) for name in names)
    return [f"{name}: {was!r} -> {is_now!r}" for name, was, is_now in shown if was != is_now]


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs such as ("data.num_problems", 16); the items of a list of mappings are numbered."""
    is_listed = isinstance(values, list | tuple) and any(isinstance(part, Mapping) for part in values)
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if is_listed else ()
    if not items:
        yield prefix, values
        return
    for key, value in items:
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))


def hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters in a config of fit, by dotted key."""
    data = {key: value for key, value in config["data"].items() if key not in ONLY_EVALUATION}
    trainer = {key: config["trainer"][key] for key in TRAINER_HYPERPARAMETERS}
    return flatten_by_class({key: config[key] for key in HYPERPARAMETERS} | {"data": data, "trainer": trainer})


def flatten_by_class(config: Mapping[str, Any]) -> dict[str, str | float]:
    """Flatten a config to values by key: ``model.gate: QuantileGate``, ``model.gate.top_fraction: 0.2``.

    A class becomes its name, with its arguments below it; nulls are left out.
    """
    values: dict[str, str | float] = {}
    for key, value in flatten(config):
        *above, last = key.split(".")
        name = ".".join(part for part in (*above, last) if part not in ("class_path", "init_args"))
        if last == "class_path":
            value = value.rpartition(".")[2]
        if value is not None and value != {}:
            values[name] = value if isinstance(value, str | bool | int | float) else str(value)
    return values
