"""Keeps a run's config in its log folder and in its checkpoints, and tells what a resumed run changes."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

KEY = "egspo_config"
NOT_TRAINING = ("config", "ckpt_path", "weights_only", "trainer.default_root_dir")
"""Fields that say where a run is, not what it is."""


class RunConfig(SaveConfigCallback):
    """Lightning's SaveConfigCallback; the config also goes into each checkpoint, as plain data.

    On resuming, the values of this run hold, and each that is not the checkpoint's is printed.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the config into the checkpoint."""
        checkpoint[KEY] = plain(self.config.as_dict())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell field by field what is not as it was."""
        if KEY not in checkpoint:
            rank_zero_info("The checkpoint holds no config, so what has changed since cannot be told.")
            return
        changed = differences(checkpoint[KEY], plain(self.config.as_dict()))
        if changed:
            rank_zero_info("Changed against the checkpoint; the values of this run hold:")
        for line in changed:
            rank_zero_info(f"  {line}")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``field: old -> new`` for every field in which two configs differ, in alphabetical order."""
    old, new = dict(flatten(before)), dict(flatten(now))
    names = [n for n in sorted(old.keys() | new.keys()) if n not in NOT_TRAINING and not n.startswith("config.")]
    absent = "absent"
    shown = ((name, old.get(name, absent), new.get(name, absent)) for name in names)
    return [f"{name}: {was!r} -> {is_now!r}" for name, was, is_now in shown if was != is_now]


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("data.num_problems", 16) and so on; parts of lists are numbered."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else None
    if items is None or not values:
        yield prefix, values
        return
    for key, value in items:
        yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))


def plain(value: Any) -> Any:
    """The same of numbers, texts, lists and dictionaries alone, as ``weights_only`` loads them."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
