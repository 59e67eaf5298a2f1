"""The learning curves as a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from comparison.campaign import Results
from comparison.plan import AFTER_SFT, Run
from comparison.statistics import Scores

NUM_POINTS = 81
"""Points at which curves are drawn; seeds are measured at different phases after their checkpoints."""
STYLES = ("-", "--", "-.", ":")


def draw(results: Results, labels: Sequence[str], path: Path) -> None:
    """One curve a method: accuracy over phases, mean over seeds, with the standard error of the mean as a band."""
    mpl.use("Agg")
    from matplotlib import pyplot  # after the choice of the backend

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for i, label in enumerate(labels):
        curves = [_from_checkpoint(run, results) for run in results if run.label == label]
        if curves:
            phases, scores = on_one_grid(curves)
            _band(axes, phases, scores, label=f"{label} ({len(curves)})", style=STYLES[(i // 7) % len(STYLES)])
    axes.set_xlabel("phases after the SFT checkpoint (rollout collections, or as many updates of SFT)")
    axes.set_ylabel("held-out accuracy, share of problems")
    axes.set_title("Mean over seeds, band: standard error over seeds")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(title="method (seeds)", fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _from_checkpoint(run: Run, results: Results) -> list[tuple[float, float]]:
    """(phases, accuracy); one that goes on with SFT is not measured before its first pass, but its checkpoint is."""
    curve = results[run]["curve"]
    start = results.get(Run(AFTER_SFT, None, run.seed))
    return curve if start is None or curve[0][0] == 0 else [(0.0, start["accuracy"]), *curve]


def on_one_grid(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[NDArray[np.float64], Scores]:
    """Curves of several seeds, (S, N), at the same phases (N,), from the start to where the shortest one ends."""
    phases = np.linspace(0.0, min(curve[-1][0] for curve in curves), NUM_POINTS)
    return phases, np.array([np.interp(phases, *np.array(curve, dtype=np.float64).T) for curve in curves])


def _band(axes: Axes, phases: NDArray[np.float64], scores: Scores, *, label: str, style: str) -> None:
    mean = scores.mean(0)
    (line,) = axes.plot(phases, mean, style, label=label)
    if len(scores) > 1:
        error = scores.std(0, ddof=1) / np.sqrt(len(scores))
        axes.fill_between(phases, mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0)
