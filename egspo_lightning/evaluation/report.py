"""Evaluation reports: JSON values and tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Table
from torch import Tensor

from egspo_lightning.evaluation.scores import by_label, summary
from egspo_lightning.types import Problem

Metrics = dict[str, float]


class Report(NamedTuple):
    """The scores of a benchmark, in total, by subject and by level."""

    benchmark: str
    num_samples: int
    metrics: Metrics
    by_subject: dict[str, Metrics]
    by_level: dict[str, Metrics]


def report(benchmark: str, problems: Sequence[Problem], num_samples: int, table: Tensor) -> Report:
    """Compute the scores of a benchmark from the counts of its problems (see ``scores.BenchmarkMetric``)."""
    return Report(
        benchmark,
        num_samples,
        summary(table, num_samples),
        by_label(table, [problem.subject for problem in problems], num_samples),
        by_label(table, [problem.level for problem in problems], num_samples),
    )


def milestones_table(latest: Mapping[str, Metrics], milestones: Mapping[str, Mapping[str, Metrics]]) -> Table:
    """Table of benchmarks: number of problems, and avg@n at each milestone; a dash where it was not measured."""
    table = _table("Benchmarks", "benchmark", "problems", "metric", *milestones)
    for name, values in latest.items():
        metric = headline(values)
        found = [results.get(name, {}).get(metric) for results in milestones.values()]
        scores = ["-" if score is None else f"{score:.3f}" for score in found]
        table.add_row(name, f"{values['num_problems']:.0f}", metric, *scores)
    return table


def score_tables(reports: Sequence[Report]) -> list[Table]:
    """Tables of all benchmarks, of pass@k where there are several samples, and of subjects and levels."""
    whole = _score_table("Benchmarks", "benchmark", [(r.benchmark, r.metrics, r.num_samples) for r in reports])
    whole.caption = _note(reports)
    several = [found for found in reports if found.num_samples > 1]
    parts = [
        _score_table(f"{r.benchmark} by {label}", label, [(name, m, r.num_samples) for name, m in part.items()])
        for r in reports
        for label, part in (("subject", r.by_subject), ("level", r.by_level))
        if part
    ]
    return [whole, *([_pass_table(several)] if several else []), *parts]


def headline(metrics: Metrics) -> str:
    """The main metric of a benchmark: avg@n."""
    return next(name for name in metrics if name.startswith("avg@"))


def _score_table(title: str, label: str, rows: Sequence[tuple[str, Metrics, int]]) -> Table:
    """Table of name, metrics and number of samples n; n has a column of its own where rows differ in it."""
    sizes = {n for _, _, n in rows}
    at = f"@{sizes.pop()}" if len(sizes) == 1 else ""
    columns = ("problems", *([] if at else ["n"]), f"avg{at}", f"pass{at}", f"maj{at}", "length", "truncated")
    table = _table(title, label, *columns)
    for name, metrics, n in rows:
        error = metrics.get(f"avg@{n}_se")
        table.add_row(
            name,
            f"{metrics['num_problems']:.0f}",
            *([] if at else [str(n)]),
            f"{metrics[f'avg@{n}']:.3f}" + ("" if error is None else f" ± {error:.3f}"),
            f"{metrics[f'pass@{n}']:.3f}",
            f"{metrics[f'maj@{n}']:.3f}",
            f"{metrics['length_mean']:.1f}",
            f"{metrics['truncated_fraction']:.1%}",
        )
    return table


def _pass_table(reports: Sequence[Report]) -> Table:
    names = {name: None for found in reports for name in found.metrics if name.startswith("pass@")}
    columns = sorted(names, key=lambda name: int(name.removeprefix("pass@")))
    table = _table("At least one of k samples is correct", "benchmark", *columns)
    for found in reports:
        values = [found.metrics.get(name) for name in columns]
        table.add_row(found.benchmark, *("" if value is None else f"{value:.3f}" for value in values))
    return table


def _note(reports: Sequence[Report]) -> str:
    timeouts, crashes = (int(sum(r.metrics[f"grader_{name}"] for r in reports)) for name in ("timeouts", "crashes"))
    note = "± is the standard error over problems."
    if timeouts or crashes:
        note += f" Counted as wrong: {timeouts} timeouts and {crashes} crashes of the grader."
    return note


def _table(title: str, *columns: str) -> Table:
    """A table whose first column holds names, which may fold, and whose other columns hold numbers, which do not."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    return table
