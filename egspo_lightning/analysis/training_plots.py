"""Plots of entropy, gate and metrics over training.

Each function draws on ``ax``, or a new figure, and returns the axes.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from egspo_lightning.analysis.interval_estimates import means
from egspo_lightning.analysis.plot_axes import (
    ABOVE,
    ENTROPY_LABEL,
    HIGH,
    LOW,
    ROLLOUT_BATCH_LABEL,
    SEQUENTIAL,
    axes_for,
    by_run,
    entropy_edges,
    finish,
    without_masked,
)


def entropy_heatmap(tokens: pd.DataFrame, *, bins: int = 40, ax: Axes | None = None) -> Axes:
    """Histograms of token entropy over training, one column a recorded rollout batch, with the threshold."""
    ax = axes_for(ax, "entropy_heatmap", tokens, ["rollout_batch", "entropy", "threshold"], one_run=True)
    groups = tokens.groupby("rollout_batch")
    edges = entropy_edges(tokens["entropy"], bins)
    inside = tokens["entropy"].clip(upper=edges[-1]).groupby(tokens["rollout_batch"])
    shares = np.array([np.histogram(part, edges)[0] / len(part) for _, part in inside])
    numbers = np.array(list(groups.groups))
    shown = np.ma.masked_equal(shares.T, 0.0)
    mesh = ax.pcolormesh(_borders(numbers), edges, shown, cmap=SEQUENTIAL, norm=LogNorm(1e-3, 1.0))
    ax.figure.colorbar(mesh, ax=ax, label="share of tokens in the bin")
    threshold = groups["threshold"].mean()
    if np.isfinite(threshold).all():
        ax.plot(numbers, threshold, color=HIGH, marker=".", label="threshold tau")
    return finish(ax, x=ROLLOUT_BATCH_LABEL, y=ENTROPY_LABEL, title=f"Token entropy; {ABOVE}")


def threshold_curve(tokens: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Mean threshold tau of the gate in each rollout batch. Runs with an open gate are left out."""
    ax = axes_for(ax, "threshold_curve", tokens, ["rollout_batch", "threshold"])
    for run, rows, color in by_run(tokens[np.isfinite(tokens["threshold"])]):
        ax.plot(rows.groupby("rollout_batch")["threshold"].mean(), color=color, marker=".", label=run)
    ax.set_ylim(bottom=0)
    return finish(ax, x=ROLLOUT_BATCH_LABEL, y="threshold tau (nats)", title="Threshold of the gate")


def high_share_curve(tokens: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of recorded tokens of high entropy, with 95 % intervals over completions; without masked ones."""
    ax = axes_for(ax, "high_share_curve", tokens, ["rollout_batch", "completion_id", "is_high_entropy"])
    for run, rows, color in by_run(without_masked(tokens)):
        share = means(rows, ["rollout_batch"], "is_high_entropy") * 100
        ax.errorbar(share.index, share["mean"], share["half_width"], color=color, marker=".", capsize=2, label=run)
    ax.set_ylim(bottom=0)
    return finish(ax, x=ROLLOUT_BATCH_LABEL, y="high-entropy tokens (%)", title="High-entropy tokens")


def weight_mass(tokens: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Shares of high-entropy and low-entropy tokens in the sum of the weights g_t, and the share of high tokens.

    Masked completions are left out.
    """
    ax = axes_for(ax, "weight_mass", tokens, ["rollout_batch", "token_weight", "is_high_entropy"], one_run=True)
    tokens = without_masked(tokens)
    mass = tokens.pivot_table("token_weight", "rollout_batch", "is_high_entropy", aggfunc="sum", fill_value=0.0)
    mass = mass.reindex(columns=[True, False], fill_value=0.0)
    share = 100 * mass.div(mass.sum(axis=1), axis=0)
    ax.stackplot(share.index, share[True], share[False], colors=[HIGH, LOW], labels=["high tokens", "low tokens"], lw=0)
    high = 100 * tokens.groupby("rollout_batch")["is_high_entropy"].mean()
    ax.plot(high, color="black", linestyle="--", label="high tokens, share of all")
    ax.set_ylim(0, 100)
    ax.margins(x=0)
    title = "Weight of high and low tokens"
    return finish(ax, x=ROLLOUT_BATCH_LABEL, y="share of the weight (%)", title=title)


def metric_curves(metrics: pd.DataFrame, name: str, *, unit: str, window: int = 1, ax: Axes | None = None) -> Axes:
    """Logged metric over optimizer steps, as a running mean over ``window`` values."""
    ax = axes_for(ax, "metric_curves", metrics, ["step", name])
    for run, rows, color in by_run(metrics.dropna(subset=[name])):
        ax.plot(rows["step"], rows[name].rolling(window, min_periods=1).mean(), color=color, label=run)
    smoothed = f", mean of {window} values" if window > 1 else ""
    return finish(ax, x="optimizer step (number)", y=f"{name} ({unit})", title=f"{name}{smoothed}")


def accuracy_against_entropy(metrics: pd.DataFrame, *, window: int = 5, ax: Axes | None = None) -> Axes:
    """Accuracy of the rollouts against policy entropy, as a path from circle to square.

    Each point is a running mean over ``window`` rollout batches of all ranks.
    """
    columns = ["policy/entropy", "rollout/accuracy"]
    ax = axes_for(ax, "accuracy_against_entropy", metrics, columns)
    for run, rows, color in by_run(metrics.dropna(subset=columns)):
        path = rows[columns].rolling(window, min_periods=window).mean().dropna()
        entropy, accuracy = path["policy/entropy"], 100 * path["rollout/accuracy"]
        ax.plot(entropy, accuracy, color=color, linewidth=1, alpha=0.7, marker=".", markersize=4, label=run)
        for end, marker in ((0, "o"), (-1, "s")):
            ax.plot(entropy.iloc[[end]], accuracy.iloc[[end]], marker, color=color, markeredgecolor="black")
    title = "Accuracy against entropy, from circle to square"
    return finish(ax, x="policy entropy (nats a token)", y="accuracy of rollouts (%)", title=title)


def _borders(numbers: np.ndarray) -> np.ndarray:
    """Borders of cells around the numbers, midway between neighbors."""
    if len(numbers) == 1:
        return np.array([numbers[0] - 0.5, numbers[0] + 0.5])
    middles = (numbers[1:] + numbers[:-1]) / 2
    return np.array([2 * numbers[0] - middles[0], *middles, 2 * numbers[-1] - middles[-1]])
