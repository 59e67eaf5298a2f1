"""Run definitions: configs, methods, seeds and settings, validated before training.

This module imports neither torch nor Lightning, so the parent process starts at once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from egspo_lightning.errors import UserError

METHODS = Path(__file__).parents[2] / "configs" / "methods"
AFTER_SFT = "after_sft"
"""Label of the SFT checkpoints in reports."""


@dataclass(frozen=True)
class Settings:
    """Settings that all runs of a comparison share.

    Args:
        configs: Config files; a later one overrides an earlier one.
        phases: Rollout batches per run.
        evaluate_every: Phases between two points of the learning curve.
        threads: Torch threads per process; results depend on them by rounding.
        output: Folder for the results.
    """

    configs: tuple[Path, ...]
    phases: int
    evaluate_every: int
    threads: int
    output: Path


@dataclass(frozen=True)
class Run:
    """One training run: a method that starts from the SFT checkpoint of a seed, or the SFT run itself.

    Args:
        label: Name in tables and folders.
        method: Name of the overlay; None for the SFT run that all methods start from.
        seed: Seed of the run.
        learning_rate: Learning rate after the checkpoint; None keeps that of the config.
    """

    label: str
    method: str | None
    seed: int
    learning_rate: float | None = None

    @property
    def overlay(self) -> Path | None:
        """Config file of the method."""
        return None if self.method is None else METHODS / f"{self.method}.yaml"

    @property
    def is_sft(self) -> bool:
        """Whether the method continues SFT."""
        overlay = {} if self.overlay is None else read_yaml(self.overlay)
        return (overlay.get("stage_transition") or {}).get("enabled") is False

    def result_file(self, output: Path) -> Path:
        """Result; exists once the run has finished."""
        return output / "runs" / self.label / f"seed_{self.seed}.json"

    def metrics_file(self, output: Path) -> Path:
        """Metrics per phase."""
        return self.result_file(output).with_suffix(".csv")

    def error_file(self, output: Path) -> Path:
        """Error message and traceback of a failed run."""
        return self.result_file(output).with_suffix(".error.txt")

    def workspace(self, output: Path) -> Path:
        """Folder of a run in progress; an interrupted run leaves it behind."""
        return output / "unfinished" / self.label / f"seed_{self.seed}"

    def settings(self, shared: Settings) -> dict[str, Any]:
        """All settings that the result depends on, apart from the code."""
        config = {"config": [read_yaml(path) for path in shared.configs], "threads": shared.threads}
        if self.overlay is None:
            return config
        return config | {
            "method": read_yaml(self.overlay),
            "learning_rate": self.learning_rate,
            "phases": shared.phases,
            "evaluate_every": shared.evaluate_every,
        }


Results = dict[Run, dict[str, Any]]


def checkpoint_file(output: Path, seed: int) -> Path:
    """The SFT checkpoint that all methods of a seed start from."""
    return output / "checkpoints" / f"seed_{seed}.ckpt"


def steps_per_phase(configs: Sequence[Path]) -> int:
    """Optimizer steps per rollout batch: num_ppo_epochs * num_minibatches."""
    data: dict[str, Any] = {}
    for path in configs:
        data |= read_yaml(path).get("data") or {}
    return int(data.get("num_ppo_epochs", 1)) * int(data.get("num_minibatches", 1))


def sft_runs(seeds: Sequence[int]) -> list[Run]:
    """The SFT runs of these seeds."""
    return [Run(AFTER_SFT, None, seed) for seed in seeds]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {error}. Give an existing YAML file.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, got {type(content).__name__}.")
    return content


def require_methods(names: Sequence[str], flag: str = "--methods") -> None:
    """Raise a UserError for unknown or repeated methods."""
    known = sorted(path.stem for path in METHODS.glob("*.yaml"))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"{flag}: no overlay named {', '.join(unknown)} in configs/methods. Choose from {', '.join(known)}."
        )
    require_distinct(names, flag)


def require_distinct(values: Sequence[Any], flag: str) -> None:
    """Raise a UserError for repeated values."""
    twice = sorted({str(value) for value in values if list(values).count(value) > 1})
    if twice:
        raise UserError(f"{flag}: {', '.join(twice)} given twice. Give each once.")


def read_learning_rates(path: Path | None, methods: Sequence[str]) -> dict[str, float]:
    """Read learning rates by method from a YAML or JSON file; other methods keep the rate of the config.

    Raises:
        UserError: a value is not a number above 0, or the file names none of the compared methods.
    """
    if path is None:
        return {}
    rates = read_yaml(path)
    require_methods([str(method) for method in rates], f"--learning_rates: {path}")
    for method, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
            raise UserError(
                f"--learning_rates: {path} gives {method}: {rate!r}, but a rate is a number above 0 (1.0e-4)."
            )
    if not set(rates) & set(methods):
        raise UserError(f"--learning_rates: {path} names only {', '.join(rates)}, none of the --methods.")
    return {method: float(rate) for method, rate in rates.items()}


def read_result(run: Run, shared: Settings) -> dict[str, Any] | None:
    """Read the result of a run; None if the run has not finished.

    Raises:
        UserError: the result was made with other settings.
    """
    path = run.result_file(shared.output)
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    differing = differences(result["settings"], json.loads(json.dumps(run.settings(shared))))
    if differing:
        raise UserError(
            f"--output: {path} was made with other settings: {'; '.join(differing)}. Use those settings, use "
            "another --output, or delete the old results."
        )
    return result


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
