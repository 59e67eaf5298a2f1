"""What is to be run: configs, methods, seeds and settings, checked before anything is trained.

Imports neither torch nor Lightning: the process that plans starts at once, and its workers do the rest.
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
"""The name under which the SFT checkpoints themselves are reported."""


@dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share.

    Args:
        configs: Config files; a later one overrides an earlier one.
        phases: Rollout collections of each run.
        evaluate_every: Phases from one point of the learning curve to the next.
        threads: Threads of torch in each process: figures depend on them, by rounding.
        output: Folder of the results.
    """

    configs: tuple[Path, ...]
    phases: int
    evaluate_every: int
    threads: int
    output: Path


@dataclass(frozen=True)
class Run:
    """One training run: a method from the SFT checkpoint of a seed, or the SFT that makes the checkpoint.

    Args:
        label: Its name in tables and folders.
        method: The overlay; None is the SFT that all methods start from.
        seed: Of everything.
        learning_rate: Of what follows the checkpoint; None is that of the config.
    """

    label: str
    method: str | None
    seed: int
    learning_rate: float | None = None

    @property
    def overlay(self) -> Path | None:
        """The file of the method."""
        return None if self.method is None else METHODS / f"{self.method}.yaml"

    @property
    def is_sft(self) -> bool:
        """Whether it goes on with SFT."""
        overlay = {} if self.overlay is None else read_yaml(self.overlay)
        return (overlay.get("stage_transition") or {}).get("enabled") is False

    def result_file(self, output: Path) -> Path:
        """Where its result lies, once it is finished."""
        return output / "runs" / self.label / f"seed_{self.seed}.json"

    def metrics_file(self, output: Path) -> Path:
        """Where its metrics lie, phase by phase."""
        return self.result_file(output).with_suffix(".csv")

    def error_file(self, output: Path) -> Path:
        """Where it is told what has stopped it."""
        return self.result_file(output).with_suffix(".error.txt")

    def workspace(self, output: Path) -> Path:
        """Where it works; a run that was stopped leaves it behind."""
        return output / "unfinished" / self.label / f"seed_{self.seed}"

    def settings(self, shared: Settings) -> dict[str, Any]:
        """All that its result depends on, besides the code."""
        config = {"config": [read_yaml(path) for path in shared.configs], "threads": shared.threads}
        if self.overlay is None:
            return config
        return config | {
            "method": read_yaml(self.overlay),
            "learning_rate": self.learning_rate,
            "phases": shared.phases,
            "evaluate_every": shared.evaluate_every,
        }


def checkpoint_file(output: Path, seed: int) -> Path:
    """The SFT checkpoint that all methods of a seed start from."""
    return output / "checkpoints" / f"seed_{seed}.ckpt"


def updates_per_phase(configs: Sequence[Path]) -> int:
    """Updates on one rollout collection: num_ppo_epochs * num_minibatches."""
    data: dict[str, Any] = {}
    for path in configs:
        data |= read_yaml(path).get("data") or {}
    return int(data.get("num_ppo_epochs", 1)) * int(data.get("num_minibatches", 1))


def sft_runs(seeds: Sequence[int]) -> list[Run]:
    """The runs that make the checkpoints."""
    return [Run(AFTER_SFT, None, seed) for seed in seeds]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        UserError: it is not there or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {error}. Give an existing YAML file.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, got {type(content).__name__}.")
    return content


def require_methods(names: Sequence[str], flag: str = "--methods") -> None:
    """Refuse names that are no overlay, and names given twice."""
    known = sorted(path.stem for path in METHODS.glob("*.yaml"))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"{flag}: no overlay named {', '.join(unknown)} in configs/methods. There are {', '.join(known)}."
        )
    require_distinct(names, flag)


def require_distinct(values: Sequence[Any], flag: str) -> None:
    """Refuse a value that is given twice."""
    twice = sorted({str(value) for value in values if list(values).count(value) > 1})
    if twice:
        raise UserError(f"{flag}: {', '.join(twice)} given twice. Name each once.")


def read_learning_rates(path: Path | None, methods: Sequence[str]) -> dict[str, float]:
    """Method to learning rate, from a YAML or JSON file; methods that it does not name keep that of the config.

    Raises:
        UserError: a value is not a number above 0, or no method of the file is compared.
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
        raise UserError(f"--learning_rates: {path} names {', '.join(rates)}, and none of the --methods.")
    return {method: float(rate) for method, rate in rates.items()}


def read_result(run: Run, shared: Settings) -> dict[str, Any] | None:
    """The result of a finished run, None where there is none.

    Raises:
        UserError: there is one with other settings.
    """
    path = run.result_file(shared.output)
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    differing = differences(result["settings"], json.loads(json.dumps(run.settings(shared))))
    if differing:
        raise UserError(
            f"--output: {path} was made with other settings: {'; '.join(differing)}. Results are not mixed: give "
            "those settings again, another --output, or delete the old results."
        )
    return result


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two settings, as "key: old there, new now"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new})
        pairs = [(f"{name}.{key}" if name else str(key), old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{name}: {_brief(old)} there, {_brief(new)} now"]
    return [line for key, a, b in pairs for line in differences(a, b, key)]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
