"""Plots of token entropy: by position, token and correctness, and before and after the optimizer steps.

Each function draws on ``ax``, or a new figure, and returns the axes.
"""

from typing import Literal

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
    RIGHT,
    SEQUENTIAL,
    WRONG,
    axes_for,
    by_run,
    entropy_edges,
    finish,
    require_frame,
)
from egspo_lightning.analysis.token_text import visible
from egspo_lightning.errors import UserError


def entropy_by_position(tokens: pd.DataFrame, *, min_count: int = 20, ax: Axes | None = None) -> Axes:
    """Mean entropy at each position of the completion, with a band from the 25 % to the 75 % quantile.

    Positions with fewer than ``min_count`` tokens are left out.
    """
    ax = axes_for(ax, "entropy_by_position", tokens, ["position", "entropy"])
    for run, rows, color in by_run(tokens):
        places = rows.groupby("position")["entropy"].describe()
        places = places[places["count"] >= min_count]
        ax.fill_between(places.index, places["25%"], places["75%"], color=color, alpha=0.2, linewidth=0)
        ax.plot(places["mean"], color=color, marker=".", label=f"{run}, mean")
    ax.set_ylim(bottom=0)
    title = "Entropy by position; band: 25 % to 75 % quantile"
    return finish(ax, x="position in the completion (tokens)", y=ENTROPY_LABEL, title=title)


def entropy_by_token(
    tokens: pd.DataFrame,
    *,
    top: int = 20,
    order: Literal["entropy", "count"] = "entropy",
    min_count: int = 20,
    ax: Axes | None = None,
) -> Axes:
    """Mean entropy by sampled token, with 95 % intervals and counts.

    Shows the ``top`` tokens of highest mean or count, highest first, among those sampled at least ``min_count`` times.
    """
    require_frame("entropy_by_token", tokens, ["completion_id", "token", "entropy"], one_run=True)
    found = means(tokens, ["token"], "entropy")
    found = found[found["count"] >= min_count].nlargest(top, "mean" if order == "entropy" else "count")
    if found.empty:
        raise UserError(f"entropy_by_token: no token was sampled {min_count} times. Lower min_count.")
    ax = axes_for(ax, "entropy_by_token", tokens, [])
    places = np.arange(len(found))
    ax.errorbar(found["mean"], places, xerr=found["half_width"], fmt="o", color=LOW, capsize=2)
    labels = zip(found.index, found["count"], strict=True)
    names = [f"{visible(token, spaces=True) or '(empty)'}   n = {count:,}" for token, count in labels]
    ax.set_yticks(places, names, family="monospace", fontsize=8, parse_math=False)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.grid(axis="y", alpha=0.3)
    highest = "highest mean entropy" if order == "entropy" else "highest count"
    title = f"Entropy by token: the {len(found)} of {highest}"
    return finish(ax, x="mean token entropy (nats), 95 % interval", y="token sampled, and how often", title=title)


def entropy_by_correctness(
    tokens: pd.DataFrame, completions: pd.DataFrame, *, bins: int = 40, ax: Axes | None = None
) -> Axes:
    """Histograms of token entropy in right and in wrong completions, with means."""
    require_frame("entropy_by_correctness", completions, ["completion_id", "is_correct"])
    ax = axes_for(ax, "entropy_by_correctness", tokens, ["completion_id", "entropy"], one_run=True)
    verdicts = completions[["run", "completion_id", "is_correct"]]
    joined = tokens.merge(verdicts, on=["run", "completion_id"], validate="many_to_one")
    edges = entropy_edges(joined["entropy"], bins)
    for verdict, name, color in ((True, "right", RIGHT), (False, "wrong", WRONG)):
        rows = joined[joined["is_correct"] == verdict]
        if rows.empty:
            continue
        share = 100 * np.histogram(rows["entropy"].clip(upper=edges[-1]), edges)[0] / len(rows)
        mean, count = rows["entropy"].mean(), rows["completion_id"].nunique()
        ax.stairs(share, edges, color=color, linewidth=1.8, label=f"{name}: {count:,} completions, mean {mean:.3f}")
        ax.axvline(mean, color=color, linestyle="--", linewidth=1)
    ax.set_yscale("log")
    title = f"Entropy by correctness; {ABOVE}; means dashed"
    return finish(ax, x=ENTROPY_LABEL, y="share of tokens in the bin (%)", title=title)


def entropy_before_after(tokens: pd.DataFrame, *, bins: int = 60, ax: Axes | None = None) -> Axes:
    """Entropy of each token before and after the optimizer steps on its rollout batch; the diagonal is no change."""
    ax = axes_for(ax, "entropy_before_after", tokens, ["entropy", "entropy_after"], one_run=True)
    edges = entropy_edges(tokens["entropy"], bins)
    before, after = (tokens[name].clip(0.0, edges[-1]) for name in ("entropy", "entropy_after"))
    counts, _, _ = np.histogram2d(before, after, (edges, edges))
    shown = np.ma.masked_equal(counts.T, 0)
    mesh = ax.pcolormesh(edges, edges, shown, cmap=SEQUENTIAL, norm=LogNorm(1, max(counts.max(), 2)))
    ax.figure.colorbar(mesh, ax=ax, label="tokens")
    ax.axline((0, 0), slope=1, color="black", linestyle="--", linewidth=1)
    ax.set_aspect("equal")
    title = f"Entropy after the optimizer steps\n({ABOVE})"
    return finish(ax, x="entropy before (nats)", y="entropy after (nats)", title=title)


def ratio_by_entropy(tokens: pd.DataFrame, *, bins: int = 16, ax: Axes | None = None) -> Axes:
    """Median ratio pi / pi_old after the optimizer steps, by entropy, for positive and for negative advantages.

    All points have the same number of tokens. The bands reach from the 25 % to the 75 % quantile. The vertical line is
    the mean threshold.
    """
    ax = axes_for(ax, "ratio_by_entropy", tokens, ["entropy", "ratio", "advantage", "threshold"], one_run=True)
    for sign, name, color in ((1, "A > 0", RIGHT), (-1, "A < 0", WRONG)):
        rows = tokens[np.sign(tokens["advantage"]) == sign]
        if rows.empty:
            continue
        cells = rows.groupby(pd.qcut(rows["entropy"], bins, duplicates="drop"), observed=True)
        x, found = cells["entropy"].median(), cells["ratio"].describe()
        ax.fill_between(x, found["25%"], found["75%"], color=color, alpha=0.2, linewidth=0)
        ax.plot(x, found["50%"], color=color, marker=".", label=f"{name}, median")
    ax.axhline(1.0, color="black", linewidth=0.8)
    if np.isfinite(tokens["threshold"]).all():
        ax.axvline(tokens["threshold"].mean(), color=HIGH, linestyle="--", label="mean threshold")
    title = "Ratio after the optimizer steps; bands: 25 % to 75 % quantile"
    return finish(ax, x=ENTROPY_LABEL, y="ratio pi / pi_old", title=title)
