"""Plotly charts of the report: metrics and benchmark accuracies of one or several runs over training."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from egspo_lightning.analysis.interval_estimates import accuracy_interval
from egspo_lightning.analysis.rounding import rounded
from egspo_lightning.analysis.run_reading import Run

RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""A color a run, from Okabe and Ito's palette for the color blind."""
ALL, HIGH, LOW = "#1c1c1c", "#D55E00", "#0072B2"
"""Colors of all tokens, of high-entropy and of low-entropy tokens where a chart has a single run."""
TAU = "gate/threshold"
"""Metric that only runs with a gate log."""
SMOOTHED_SHARE = 25
"""A bold line is a running mean over this part of the run's phases."""
MAX_POINTS = 1000
"""Points of a line; longer ones are thinned out."""
DIGITS = 4
"""Significant digits of drawn values."""


class Line(NamedTuple):
    """A metric in a chart; ``is_rest`` draws 1 - metric, and a line of a branch is left out where the gate is open."""

    metric: str
    label: str = ""
    dash: str = "solid"
    color: str = ALL
    is_rest: bool = False
    is_branch: bool = False


class Chart(NamedTuple):
    """Title, unit, lines and number format (of d3) of a chart."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    tick_format: str = ""


CHARTS = (
    Chart("Reward", "mean of a rollout batch", (Line("rollout/reward_mean"),)),
    Chart(
        "Entropy",
        "nats a token",
        (
            Line("policy/entropy", "all tokens"),
            Line("policy/entropy_high", "high", "dash", HIGH, is_branch=True),
            Line("policy/entropy_low", "low", "dot", LOW, is_branch=True),
        ),
    ),
    Chart("Threshold tau", "nats", (Line(TAU),)),
    Chart("High-entropy tokens", "share of tokens", (Line("gate/high_fraction"),), "~%"),
    Chart(
        "Weight held by high and low tokens",
        "share of the total",
        (
            Line("gate/high_weight_fraction", "high", "solid", HIGH, is_branch=True),
            Line("gate/high_weight_fraction", "low", "dot", LOW, is_rest=True, is_branch=True),
        ),
        "~%",
    ),
    Chart(
        "KL divergence",
        "nats a token",
        (Line("policy/approx_kl", "from the sampling policy"), Line("rollout/kl", "from the reference", "dash", LOW)),
    ),
    Chart("Length", "tokens a completion", (Line("rollout/length_mean"),)),
    Chart("Truncated completions", "share", (Line("rollout/truncated_fraction"),), "~%"),
    Chart("SFT loss", "nats a token", (Line("loss/sft"),)),
)
"""Charts of metrics, in the order of the page; the accuracies of the benchmarks come after the first."""

AXIS = {"showgrid": True, "gridcolor": "#ececec", "zeroline": False, "linecolor": "#bbb", "ticks": "outside",
        "tickcolor": "#bbb", "fixedrange": False}  # fmt: skip
LAYOUT = {
    "template": "none",
    "height": 250,
    "margin": {"l": 52, "r": 12, "t": 16, "b": 38},
    "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#444"},
    "hovermode": "x unified",
    "hoverlabel": {"font": {"size": 12}, "namelength": 40},
    "showlegend": False,
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "xaxis": AXIS,
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#ccc", "activecolor": "#666"},
}


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The charts for which any run has values.

    Each has ``title``, ``unit``, ``lines`` (label, dash and color of each kind of line), and the Plotly ``figure``. A
    trace is drawn over ``x``, optimizer steps; its ``meta`` has the number of its run, and the rollout batches as a
    second x, null in stage SFT.
    """
    whole = [_metric_chart(chart, runs) for chart in CHARTS]
    whole[1:1] = [_accuracy_chart(name, runs) for name in benchmark_names(runs)]
    return [chart for chart in whole if chart["figure"]["data"]]


def benchmark_names(runs: Sequence[Run]) -> list[str]:
    """Names of the benchmarks of any run, in order."""
    return list({part["benchmark"]: None for run in runs for row in run.scores for part in row["benchmarks"]})


def color_of(number: int) -> str:
    """Color of the run of this number; colors repeat after ``RUN_COLORS``."""
    return RUN_COLORS[number % len(RUN_COLORS)]


def _metric_chart(chart: Chart, runs: Sequence[Run]) -> dict[str, Any]:
    data, drawn = [], {}
    for number, run in enumerate(runs):
        for line in chart.lines:
            rows = _rows(run, line)
            if not rows.empty:
                drawn[line.label] = line
                data += _line_traces(rows, line, run, number, line.color if len(runs) == 1 else color_of(number))
    lines = [_key_of(line, len(runs) == 1) for line in drawn.values() if line.label]
    return _figure(chart.title, chart.unit, data, runs, lines, chart.tick_format)


def _rows(run: Run, line: Line) -> pd.DataFrame:
    """The phases at which the line's metric was logged."""
    phases = run.phases
    if line.metric not in phases or (line.is_branch and TAU not in phases):
        return phases[:0]
    return phases[phases[line.metric].notna()]


def _line_traces(rows: pd.DataFrame, line: Line, run: Run, number: int, color: str) -> list[go.Scatter]:
    """The values as a thin line, and their running mean as a bold one."""
    values = 1 - rows[line.metric] if line.is_rest else rows[line.metric]
    window = max(round(len(rows) / SMOOTHED_SHARE), 1)
    smooth = values.rolling(window, min_periods=1, center=True).mean()
    kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_POINTS)).round().astype(int))
    batches = [None if np.isnan(batch) else int(batch) for batch in rows["batches"].iloc[kept]]
    shared = {"x": rows["steps"].iloc[kept].tolist(), "meta": {"run": number, "batches": batches}}
    name = ", ".join(part for part in (html.escape(run.name), line.label) if part)
    style = {"color": color, "dash": line.dash if line.label else "solid"}
    bold = go.Scatter(
        y=rounded(smooth.iloc[kept], DIGITS),
        mode="lines" if len(kept) > 1 else "markers",
        line=style | {"width": 2},
        name=name,
        hovertemplate="%{y:.4g}",
        **shared,
    )
    thin = go.Scatter(
        y=rounded(values.iloc[kept], DIGITS),
        mode="lines",
        line=style | {"width": 1},
        opacity=0.25,
        hoverinfo="skip",
        **shared,
    )
    return [thin, bold] if window > 1 else [bold]


def _accuracy_chart(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    data = [trace for number, run in enumerate(runs) if (trace := _accuracy_trace(name, run, number, len(runs) == 1))]
    return _figure(f"Accuracy on {name}", "held-out, 95 % intervals", data, runs, [], "")


def _accuracy_trace(name: str, run: Run, number: int, is_single: bool) -> go.Scatter | None:
    found = [(row["step"], part) for row in run.scores for part in row["benchmarks"] if part["benchmark"] == name]
    if not found:
        return None
    steps = [step for step, _ in found]
    values = np.array([accuracy_interval(part["metrics"], part["num_samples"]) for _, part in found])
    mean, lower, upper = values.T
    color = ALL if is_single else color_of(number)
    return go.Scatter(
        x=steps,
        y=rounded(mean, DIGITS),
        error_y={
            "array": rounded(upper - mean, DIGITS),
            "arrayminus": rounded(mean - lower, DIGITS),
            "thickness": 1,
            "width": 2,
            "color": color,
        },
        mode="lines+markers",
        line={"color": color, "width": 1.5},
        marker={"size": 6},
        name=html.escape(run.name),
        hovertemplate="%{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})",
        customdata=[rounded(pair, DIGITS) for pair in zip(lower, upper, strict=True)],
        meta={"run": number, "batches": [run.batches_at(step) for step in steps]},
    )


def _figure(
    title: str, unit: str, data: list[go.Scatter], runs: Sequence[Run], lines: list[dict[str, str]], tick_format: str
) -> dict[str, Any]:
    shapes = [_transition(run, number, len(runs) == 1) for number, run in enumerate(runs) if run.transition is not None]
    y_axis = AXIS | {"tickformat": tick_format, "rangemode": "tozero", "nticks": 6}
    figure = go.Figure(data, LAYOUT | {"yaxis": y_axis, "shapes": shapes}).to_plotly_json()
    return {"title": title, "unit": unit, "lines": lines, "figure": figure}


def _transition(run: Run, number: int, is_single: bool) -> dict[str, Any]:
    """The vertical line at a run's stage transition; its name is the number of the run."""
    line = {"color": "#666" if is_single else color_of(number), "width": 1.2, "dash": "dash"}
    label = {"text": "end of SFT", "textposition": "end", "textangle": 0, "xanchor": "left", "yanchor": "bottom"}
    label["font"] = {"size": 10, "color": "#666"}
    at = {"type": "line", "x0": run.transition, "x1": run.transition, "yref": "paper", "y0": 0, "y1": 1}
    return at | {"line": line, "name": str(number), "layer": "below"} | ({"label": label} if number == 0 else {})


def _key_of(line: Line, is_single: bool) -> dict[str, str]:
    return {"label": line.label, "dash": line.dash, "color": line.color if is_single else "#666"}
