"""Plot of the learning curves."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from comparison.plan import AFTER_SFT, Results, Run
from comparison.statistics import Scores

NUM_POINTS = 81
"""Points per curve. Seeds are evaluated at different phases after their checkpoints, so curves are interpolated."""
STYLES = ("-", "--", "-.", ":")


def draw(results: Results, labels: Sequence[str], path: Path) -> None:
    """Plot one curve per method: accuracy over phases, mean over seeds with a band of its standard error."""
    mpl.use("Agg")
    from matplotlib import pyplot  # the backend must be chosen before this import

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for i, label in enumerate(labels):
        curves = [_from_checkpoint(run, results) for run in results if run.label == label]
        if curves:
            phases, scores = on_one_grid(curves)
            _band(axes, phases, scores, label=f"{label} ({len(curves)})", style=STYLES[(i // 7) % len(STYLES)])
    axes.set_xlabel("phases after the SFT checkpoint (rollout batches, or as many optimizer steps of SFT)")
    axes.set_ylabel("held-out accuracy, share of problems")
    axes.set_title("Mean over seeds, band: standard error over seeds")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(title="method (seeds)", fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _from_checkpoint(run: Run, results: Results) -> list[tuple[float, float]]:
    """Pairs of (phases, accuracy). Continued SFT has no evaluation at 0, so its curve takes the checkpoint's."""
    curve = results[run]["curve"]
    start = results.get(Run(AFTER_SFT, None, run.seed))
    return curve if start is None or curve[0][0] == 0 else [(0.0, start["accuracy"]), *curve]


def on_one_grid(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[NDArray[np.float64], Scores]:
    """Interpolate the curves of S seeds at N common phases, up to the end of the shortest curve.

    Returns:
        phases (N,) and values (S, N)
    """
    phases = np.linspace(0.0, min(curve[-1][0] for curve in curves), NUM_POINTS)
    return phases, np.array([np.interp(phases, *np.array(curve, dtype=np.float64).T) for curve in curves])


def _band(axes: Axes, phases: NDArray[np.float64], scores: Scores, *, label: str, style: str) -> None:
    mean = scores.mean(0)
    (line,) = axes.plot(phases, mean, style, label=label)
    if len(scores) > 1:
        error = scores.std(0, ddof=1) / np.sqrt(len(scores))
        axes.fill_between(phases, mean - error, mean + error, color=line.get_color(), alpha=0.15, linewidth=0)
