"""Compared runs: config, method, seed and files of each.

This module imports neither torch nor Lightning, so that ``egspo compare`` starts at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egspo_lightning.analysis.comparison_table import AFTER_SFT
from egspo_lightning.cli.config_files import SHIPPED, flags_of, keys_of, read_config, shipped_path
from egspo_lightning.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Settings:
    """Settings that all runs of a comparison share.

    Args:
        configs: Config files; a later one overrides an earlier one.
        flags: Further flags of fit, which override the configs and the methods.
        phases: Rollout batches per run.
        evaluate_every: Phases between two points of the learning curve.
        threads: Torch threads per process; results depend on them by rounding.
        output: Folder for the results.
    """

    configs: tuple[str, ...]
    flags: tuple[str, ...]
    phases: int
    evaluate_every: int
    threads: int
    output: Path


@dataclass(frozen=True)
class Run:
    """One training run: a method that starts from the SFT checkpoint of a seed, or the SFT run itself.

    Args:
        label: Name in tables and folders.
        method: Name or path of the overlay; None for the SFT run that all methods start from.
        seed: Seed of the run.
        learning_rate: Learning rate after the checkpoint; None keeps that of the config.
    """

    label: str
    method: str | None
    seed: int
    learning_rate: float | None = None

    @property
    def overlay(self) -> str | None:
        """Config file of the method."""
        return None if self.method is None else method_file(self.method)

    @property
    def is_sft(self) -> bool:
        """Whether the method continues SFT."""
        return self.overlay is not None and config_values([self.overlay]).get("stage_transition.enabled") is False

    def result_file(self, output: Path) -> Path:
        """Result; exists once the run has finished."""
        return output / "runs" / self.label / f"seed_{self.seed}.json"

    def log_file(self, output: Path) -> Path:
        """Output of the run, with the traceback of a failure."""
        return self.result_file(output).with_suffix(".log")

    def log_folder(self, output: Path) -> Path:
        """Log folder of a finished run, with its metrics per phase; for ``egspo report``."""
        return self.result_file(output).with_suffix("")

    def workspace(self, output: Path) -> Path:
        """Folder of a run in progress; an interrupted run leaves it behind."""
        return output / "unfinished" / self.label / f"seed_{self.seed}"

    def progress_file(self, output: Path) -> Path:
        """Number of finished phases of a run in progress, and the number of all."""
        return self.workspace(output) / "progress.json"

    def settings(self, shared: Settings) -> dict[str, Any]:
        """All settings that the result depends on, apart from the code."""
        if self.overlay is None:
            return shared_values(shared)
        return shared_values(shared) | {
            "method": read_config(self.overlay),
            "learning_rate": self.learning_rate,
            "phases": shared.phases,
            "evaluate_every": shared.evaluate_every,
        }


Results = dict[Run, dict[str, Any]]


def shared_values(shared: Settings) -> dict[str, Any]:
    """Settings that the SFT checkpoints depend on."""
    configs = [read_config(path) for path in shared.configs]
    return {"config": configs, "flags": list(shared.flags), "threads": shared.threads}


def checkpoint_file(output: Path, seed: int) -> Path:
    """The SFT checkpoint that all methods of a seed start from."""
    return output / "checkpoints" / f"seed_{seed}.ckpt"


def sft_runs(seeds: Sequence[int]) -> list[Run]:
    """The SFT runs of these seeds."""
    return [Run(AFTER_SFT, None, seed) for seed in seeds]


def config_values(configs: Sequence[str], flags: Sequence[str] = ()) -> dict[str, Any]:
    """Dotted key to value, as the given configs and flags set it; defaults are not included."""
    values = {key: value for path in configs for key, value in keys_of(read_config(path))}
    return values | dict(flags_of(flags))


def steps_per_phase(configs: Sequence[str], flags: Sequence[str] = ()) -> int:
    """Optimizer steps per rollout batch: num_ppo_epochs * num_minibatches."""
    values = config_values(configs, flags)
    numbers = [whole_number(values.get(f"data.{name}")) or 1 for name in ("num_ppo_epochs", "num_minibatches")]
    return numbers[0] * numbers[1]


def num_sft_epochs(values: Mapping[str, Any]) -> int | None:
    """Most epochs of SFT, by the values of ``config_values``; None if a metric alone decides."""
    after = whole_number(values.get("stage_transition.after_epochs"))
    return after or (None if values.get("stage_transition.monitor") else 1)


def whole_number(value: Any) -> int | None:
    """A number of a config or flag; None where it is absent, null, or left to the parser of fit to refuse."""
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else None


def method_names() -> list[str]:
    """Names of the overlays in ``configs/methods``."""
    return sorted(path.stem for path in (SHIPPED / "methods").glob("*.yaml")) if SHIPPED else []


def method_file(method: str) -> str:
    """The overlay that a name or a path means."""
    return shipped_path(f"configs/methods/{method}.yaml" if method in method_names() else method)


def method_label(method: str) -> str:
    """The name of a method in tables and folders."""
    return method if method in method_names() else Path(method).stem


def require_methods(methods: Sequence[str], flag: str = "--methods") -> None:
    """Refuse unknown methods, broken overlays, and two methods of one name.

    Raises:
        UserError: naming the method.
    """
    for method in methods:
        if not Path(method_file(method)).is_file():
            known = did_you_mean(method, method_names())
            raise UserError(f"{flag}: no method {method!r}. {known}; or the path of an overlay (YAML) of your own.")
        read_config(method_file(method))
    labels = [method_label(method) for method in methods]
    require_distinct(labels, flag)
    if AFTER_SFT in labels:
        raise UserError(f"{flag}: {AFTER_SFT} is the name of the SFT checkpoints. Give the overlay another name.")


def require_distinct(values: Sequence[Any], flag: str) -> None:
    """Raise a UserError for repeated values."""
    twice = sorted({str(value) for value in values if list(values).count(value) > 1})
    if twice:
        raise UserError(f"{flag}: {', '.join(twice)} given twice. Give each once.")


def read_learning_rates(path: str | None, labels: Sequence[str]) -> dict[str, float]:
    """Read learning rates by method from a YAML or JSON file; other methods keep the rate of the config.

    Raises:
        UserError: a value is not a number above 0, or the file names none of the compared methods.
    """
    if path is None:
        return {}
    rates = read_config(path)
    for method, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
            raise UserError(
                f"--learning_rates: {path} gives {method}: {rate!r}, but a rate is a number above 0 (1.0e-4)."
            )
    unknown = sorted(set(rates) - {*labels, *method_names()})
    if unknown:
        raise UserError(f"--learning_rates: {path}: no method {unknown[0]!r}. {did_you_mean(unknown[0], labels)}.")
    if not set(rates) & set(labels):
        raise UserError(f"--learning_rates: {path} names only {', '.join(rates)}, none of the --methods.")
    return {method: float(rate) for method, rate in rates.items()}
