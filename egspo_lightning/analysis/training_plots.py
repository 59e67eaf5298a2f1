"""How entropy and gate develop over training. Each function draws on ``ax``, or a new figure, and returns the axes."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from egspo_lightning.analysis.interval_estimates import means
from egspo_lightning.analysis.plot_axes import (
    ABOVE,
    COLLECTION_LABEL,
    ENTROPY_LABEL,
    HIGH,
    LOW,
    SEQUENTIAL,
    axes_for,
    by_run,
    entropy_edges,
    finish,
    require_one_run,
)
from egspo_lightning.analysis.record_reading import require_columns


def entropy_heatmap(tokens: pd.DataFrame, *, bins: int = 40, ax: Axes | None = None) -> Axes:
    """Histograms of token entropy over training, one column a recorded collection, with the threshold over them."""
    require_columns(tokens, ["run", "collection", "entropy", "threshold"], "entropy_heatmap")
    require_one_run(tokens, "entropy_heatmap")
    ax = axes_for(ax)
    groups = tokens.groupby("collection")
    edges = entropy_edges(tokens["entropy"], bins)
    inside = tokens["entropy"].clip(upper=edges[-1]).groupby(tokens["collection"])
    shares = np.array([np.histogram(part, edges)[0] / len(part) for _, part in inside])
    numbers = np.array(list(groups.groups))
    shown = np.ma.masked_equal(shares.T, 0.0)
    mesh = ax.pcolormesh(_borders(numbers), edges, shown, cmap=SEQUENTIAL, norm=LogNorm(1e-3, 1.0))
    ax.figure.colorbar(mesh, ax=ax, label="share of tokens in the bin")
    threshold = groups["threshold"].mean()
    if np.isfinite(threshold).all():
        ax.plot(numbers, threshold, color=HIGH, marker=".", label="threshold tau")
    return finish(ax, x=COLLECTION_LABEL, y=ENTROPY_LABEL, title=f"Token entropy; {ABOVE}", legend=True)


def threshold_curve(tokens: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """The gate's threshold tau; its mean, where each completion has its own. Runs whose gate is open have none."""
    require_columns(tokens, ["run", "collection", "threshold"], "threshold_curve")
    ax = axes_for(ax)
    for run, rows, color in by_run(tokens[np.isfinite(tokens["threshold"])]):
        ax.plot(rows.groupby("collection")["threshold"].mean(), color=color, marker=".", label=run)
    ax.set_ylim(bottom=0)
    return finish(ax, x=COLLECTION_LABEL, y="threshold tau (nats)", title="Threshold of the gate", legend=True)


def high_share_curve(tokens: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of recorded tokens that the gate lets through whole, with 95 % intervals over completions."""
    require_columns(tokens, ["run", "collection", "completion_id", "is_high_entropy"], "high_share_curve")
    ax = axes_for(ax)
    for run, rows, color in by_run(tokens):
        share = means(rows, ["collection"], "is_high_entropy") * 100
        ax.errorbar(share.index, share["mean"], share["half_width"], color=color, marker=".", capsize=2, label=run)
    ax.set_ylim(bottom=0)
    return finish(ax, x=COLLECTION_LABEL, y="high-entropy tokens (%)", title="Tokens let through whole", legend=True)


def weight_mass(tokens: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Which share of the sum of the weights g_t lies on high and on low tokens, and how many are high."""
    require_columns(tokens, ["run", "collection", "token_weight", "is_high_entropy"], "weight_mass")
    require_one_run(tokens, "weight_mass")
    ax = axes_for(ax)
    mass = tokens.pivot_table("token_weight", "collection", "is_high_entropy", aggfunc="sum", fill_value=0.0)
    mass = mass.reindex(columns=[True, False], fill_value=0.0)
    share = 100 * mass.div(mass.sum(axis=1), axis=0)
    ax.stackplot(share.index, share[True], share[False], colors=[HIGH, LOW], labels=["high tokens", "low tokens"], lw=0)
    high = 100 * tokens.groupby("collection")["is_high_entropy"].mean()
    ax.plot(high, color="black", linestyle="--", label="high tokens, share of all")
    ax.set_ylim(0, 100)
    ax.margins(x=0)
    title = "Weight of high and low tokens"
    return finish(ax, x=COLLECTION_LABEL, y="share of the weight (%)", title=title, legend=True)


def metric_curves(metrics: pd.DataFrame, name: str, *, unit: str, window: int = 1, ax: Axes | None = None) -> Axes:
    """A logged metric over optimizer steps, as a running mean over ``window`` values."""
    require_columns(metrics, ["run", "step", name], "metric_curves")
    ax = axes_for(ax)
    for run, rows, color in by_run(metrics.dropna(subset=[name])):
        ax.plot(rows["step"], rows[name].rolling(window, min_periods=1).mean(), color=color, label=run)
    smoothed = f", mean of {window} values" if window > 1 else ""
    return finish(ax, x="optimizer step (number)", y=f"{name} ({unit})", title=f"{name}{smoothed}", legend=True)


def accuracy_against_entropy(metrics: pd.DataFrame, *, window: int = 5, ax: Axes | None = None) -> Axes:
    """The path of a run through accuracy and entropy of its rollouts, from the circle to the square.

    Each point is a collection, whole and over all ranks, as a running mean over ``window`` of them.
    """
    columns = ["policy/entropy", "rollout/accuracy"]
    require_columns(metrics, ["run", *columns], "accuracy_against_entropy")
    ax = axes_for(ax)
    for run, rows, color in by_run(metrics.dropna(subset=columns)):
        path = rows[columns].rolling(window, min_periods=window).mean().dropna()
        entropy, accuracy = path["policy/entropy"], 100 * path["rollout/accuracy"]
        ax.plot(entropy, accuracy, color=color, linewidth=1, alpha=0.7, marker=".", markersize=4, label=run)
        for end, marker in ((0, "o"), (-1, "s")):
            ax.plot(entropy.iloc[[end]], accuracy.iloc[[end]], marker, color=color, markeredgecolor="black")
    title = "Accuracy against entropy, from circle to square"
    return finish(ax, x="policy entropy (nats a token)", y="accuracy of rollouts (%)", title=title, legend=True)


def _borders(numbers: np.ndarray) -> np.ndarray:
    """Borders of cells around the numbers: midway between neighbors."""
    if len(numbers) == 1:
        return np.array([numbers[0] - 0.5, numbers[0] + 0.5])
    middles = (numbers[1:] + numbers[:-1]) / 2
    return np.array([2 * numbers[0] - middles[0], *middles, 2 * numbers[-1] - middles[-1]])
