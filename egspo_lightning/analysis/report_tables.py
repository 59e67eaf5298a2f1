"""Tables of the report: facts about each run, accuracies with intervals, and the settings in which runs differ."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from egspo_lightning.analysis.interval_estimates import accuracy_interval
from egspo_lightning.analysis.report_charts import ALL, benchmark_names, color_of
from egspo_lightning.analysis.run_reading import Run

PACKAGE = "egspo_lightning."
UNKNOWN = "not recorded"
MAX_SETTINGS = 40
"""Rows of the table of settings."""
NOT_SETTINGS = ("trainer.default_root_dir", "trainer.logger", "ckpt_path", "config", "predictions")
"""Keys that say where a run is, not what it trains."""


class Table(NamedTuple):
    """A table of texts: a head, and rows of the same length."""

    head: list[str]
    rows: list[list[str]]
    note: str = ""


def facts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Name and color of each run, and what it trained: pairs of label and text."""
    colors = [ALL] if len(runs) == 1 else [color_of(number) for number in range(len(runs))]
    return [{"name": run.name, "color": c, "facts": _facts(run)} for run, c in zip(runs, colors, strict=True)]


def scores(runs: Sequence[Run]) -> Table | None:
    """Accuracy of each run on each benchmark at the start, after SFT and at the end; None if none was measured."""
    rows = [row for name in benchmark_names(runs) for run in runs if (row := _scores_of(run, name))]
    note = "Intervals of 95 % over problems: Wilson's with one sample a problem, else 1.96 standard errors."
    head = ["benchmark", "run", "problems", "metric", "start", "after SFT", "end"]
    if not rows:
        return None
    return Table(head, rows, note)


def differing_settings(runs: Sequence[Run]) -> Table | None:
    """Settings in which the configs of several runs differ; None if there are none."""
    settings = [dict(_flat(run.config)) for run in runs]
    if len(runs) < 2 or not all(settings):
        return None
    names = list({name: None for values in settings for name in values if not name.startswith(NOT_SETTINGS)})
    rows = [[name, *(values.get(name, "") for values in settings)] for name in names]
    different = [row for row in rows if len(set(row[1:])) > 1]
    more = len(different) - MAX_SETTINGS
    note = f"And {more} more." if more > 0 else ""
    return Table(["setting", *(run.name for run in runs)], different[:MAX_SETTINGS], note) if different else None


def _facts(run: Run) -> list[tuple[str, str]]:
    model, data = run.config.get("model") or {}, run.config.get("data") or {}
    policy = model.get("policy") or {}
    is_new = " (random weights)" if policy.get("from_scratch") else ""
    rollouts = int(run.phases["batches"].notna().sum())
    steps = max([*run.phases["steps"], *(row["step"] for row in run.scores)], default=None)
    return [
        ("method", str(model.get("method", UNKNOWN))),
        ("model", f"{policy.get('name_or_path', UNKNOWN)}{is_new}"),
        ("demonstrations", _described(data.get("demonstrations"))),
        ("problems", _described(data.get("problems"))),
        ("rollout batch", _rollout_batch(data)),
        ("trained", UNKNOWN if steps is None else f"{steps:,.0f} optimizer steps, {rollouts:,} rollout batches"),
        ("seed", str(run.config.get("seed_everything", UNKNOWN))),
        ("folder", str(run.folder)),
    ]


def _rollout_batch(data: Mapping[str, Any]) -> str:
    sizes = [data.get(name) for name in ("num_problems", "num_generations")]
    return UNKNOWN if None in sizes else f"{sizes[0]} problems with {sizes[1]} completions each"


def _described(node: Any) -> str:
    """A class of the config by its name and its path, name or task."""
    if isinstance(node, str):
        return node.rpartition(".")[2]
    if not isinstance(node, Mapping):
        return UNKNOWN
    inside = node.get("init_args") or {}
    found = next((inside[key] for key in ("path", "name", "task") if inside.get(key)), None)
    name = str(node.get("class_path", UNKNOWN)).rpartition(".")[2]
    return name if found is None else f"{name} ({_described(found) if isinstance(found, Mapping) else found})"


def _scores_of(run: Run, benchmark: str) -> list[str] | None:
    """A row of the table of scores."""
    found = {row["step"]: part for row in run.scores for part in row["benchmarks"] if part["benchmark"] == benchmark}
    if not found:
        return None
    first, last = min(found), max(found)
    latest = found[last]
    after_sft = found.get(run.transition) if run.transition is not None else None
    cells = [_cell(part) for part in (found[first], after_sft, latest if last > first else None)]
    num_problems, metric = f"{latest['metrics']['num_problems']:.0f}", f"avg@{latest['num_samples']}"
    return [benchmark, run.name, num_problems, metric, *cells]


def _cell(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return "-"
    mean, lower, upper = accuracy_interval(part["metrics"], part["num_samples"])
    return f"{mean:.3f} ({lower:.3f} to {upper:.3f})" if lower == lower else f"{mean:.3f}"


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Values by dotted key; a class is its name, with its arguments below it, and nulls are left out."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _flat(value, prefix if key in ("init_args", "class_path") else f"{prefix}.{key}".lstrip("."))
    elif config is not None:
        is_class = isinstance(config, str) and config.startswith(PACKAGE)
        yield prefix, config.rpartition(".")[2] if is_class else str(config)
