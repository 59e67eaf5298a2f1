"""Figure of the learning curves of compared methods."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from egspo_lightning.analysis.comparison_table import AFTER_SFT, MIN_SEEDS, Result

STYLES = ("-", "--", "-.", ":")

Curve = Sequence[tuple[float, float]]
"""Pairs of (phases after the SFT checkpoint, held-out accuracy), one for each evaluation."""


def learning_curves(results: Sequence[Result], labels: Sequence[str]) -> Figure:
    """Plot accuracy over phases, one color per method.

    The thick line is the mean over seeds, at the phases at which all seeds were evaluated: no value between two
    evaluations enters it. A method with ``MIN_SEEDS`` seeds or more has a band of the standard error; one with fewer
    has a thin line for each seed.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, label in enumerate(labels):
        curves = [_from_checkpoint(run, results) for run in results if run["label"] == label]
        if curves:
            _draw(axes, curves, label=f"{label} ({len(curves)})", style=STYLES[i // 10 % len(STYLES)])
    axes.set_xlabel("phases after the SFT checkpoint (rollout batches, or as many optimizer steps of SFT)")
    axes.set_ylabel("held-out accuracy, share of problems")
    axes.set_title(f"Thick: mean over seeds. Band: standard error, from {MIN_SEEDS} seeds on. Thin: one seed", size=10)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(title="method (seeds)", fontsize="small")
    return figure


def _from_checkpoint(run: Result, results: Sequence[Result]) -> Curve:
    """The curve of a run. Continued SFT has no evaluation at 0, so its curve takes the checkpoint's."""
    curve: Curve = run["curve"]
    starts = [other["accuracy"] for other in results if (other["label"], other["seed"]) == (AFTER_SFT, run["seed"])]
    return curve if curve[0][0] == 0 or not starts else [(0.0, starts[0]), *curve]


def common_points(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """The N phases at which all S seeds were evaluated, (N,), and their values, (S, N)."""
    values = [dict(curve) for curve in curves]
    phases = sorted(set.intersection(*map(set, values)))
    return np.array(phases), np.array([[seed[phase] for phase in phases] for seed in values])


def _draw(axes: Axes, curves: Sequence[Curve], *, label: str, style: str) -> None:
    phases, scores = common_points(curves)
    mean = scores.mean(0)
    (line,) = axes.plot(phases, mean, style, marker=".", linewidth=2, label=label)
    if len(curves) >= MIN_SEEDS:
        error = scores.std(0, ddof=1) / np.sqrt(len(scores))
        axes.fill_between(phases, mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0)
    elif len(curves) > 1:
        for curve in curves:
            axes.plot(*np.array(curve).T, style, color=line.get_color(), alpha=0.4, linewidth=0.8)
