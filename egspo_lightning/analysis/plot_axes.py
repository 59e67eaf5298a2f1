"""Axes, colors and checks that all plots share, and plots of several runs side by side."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from egspo_lightning.errors import UserError

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
except ImportError as error:
    raise ImportError('Plots need matplotlib: pip install "egspo-lightning[notebooks]".') from error

HIGH, LOW = "#D55E00", "#0072B2"
"""Colors of high-entropy and low-entropy tokens, from Okabe and Ito's palette for the color blind."""
RIGHT, WRONG = "#009E73", "#CC79A7"
"""Colors of completions with a right and a wrong answer."""
RUN_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
SEQUENTIAL = "cividis"

ABOVE = "the last bin holds all larger values"
ROLLOUT_BATCH_LABEL = "rollout batch (number)"
ENTROPY_LABEL = "token entropy (nats)"


def axes_for(ax: Axes | None, plot: str, frame: pd.DataFrame, columns: Sequence[str], *, one_run: bool = False) -> Axes:
    """Check the frame of a plot, see ``require_frame``; return the given axes, or those of a new figure."""
    require_frame(plot, frame, columns, one_run=one_run)
    return plt.subplots(figsize=(6.4, 3.8), layout="constrained")[1] if ax is None else ax


def require_frame(plot: str, frame: pd.DataFrame, columns: Sequence[str], *, one_run: bool = False) -> None:
    """Check the frame that a plot draws.

    Raises:
        UserError: the frame lacks a column or has no rows, or has several runs where ``one_run`` is set
    """
    missing = [name for name in ("run", *columns) if name not in frame]
    if missing:
        raise UserError(f"{plot} needs the columns {', '.join(missing)}. Give a frame that load() has read.")
    if frame.empty:
        raise UserError(f"{plot}: the frame has no rows. Did a filter remove all of them?")
    runs = frame["run"].unique()
    if one_run and len(runs) > 1:
        raise UserError(f"{plot} draws one run, got {', '.join(runs)}. Use side_by_side({plot}, frame), or choose one.")


def without_masked(tokens: pd.DataFrame) -> pd.DataFrame:
    """Leave out the tokens of masked completions, which the gate does not weight; earlier records mark none."""
    return tokens[tokens["is_masked"].ne(True)] if "is_masked" in tokens else tokens


def entropy_edges(entropies: pd.Series, bins: int) -> np.ndarray:
    """Borders of ``bins`` bins from 0 to the 99.5 % quantile of the entropies, in nats.

    Without this limit a few large values would leave all others in the first bin. Plots count them in the last bin.
    """
    return np.linspace(0.0, max(float(entropies.quantile(0.995)), 1e-3), bins + 1)


def by_run(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, str]]:
    """Yield name, rows and color of each run, in the order of the frame."""
    for number, name in enumerate(frame["run"].unique()):
        yield name, frame[frame["run"] == name], RUN_COLORS[number % len(RUN_COLORS)]


def finish(ax: Axes, *, x: str, y: str, title: str) -> Axes:
    """Label the axes, remove the upper and right border, and put the legend, if there are labels, below the plot."""
    ax.set(xlabel=x, ylabel=y, title=title)
    ax.spines[["top", "right"]].set_visible(False)
    if labels := ax.get_legend_handles_labels()[1]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=min(len(labels), 2), frameon=False)
    return ax


def side_by_side(draw: Callable[..., Axes], frame: pd.DataFrame, *others: pd.DataFrame, **options: Any) -> np.ndarray:
    """Draw each run of a frame on its own axes, all of one scale, and return the axes.

    Args:
        draw: a plot of ``training_plots`` or ``token_plots``
        frame: the plot's frame, with several runs
        others: further frames that the plot takes
        options: keyword arguments of the plot
    """
    runs = list(frame["run"].unique())
    size = (max(4.2 * len(runs), 6.4), 3.8)
    _, axes = plt.subplots(1, len(runs), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    for ax, run in zip(axes[0], runs, strict=True):
        draw(*(part[part["run"] == run] for part in (frame, *others)), ax=ax, **options)
        ax.set(title=run, ylabel=ax.get_ylabel() if ax is axes[0, 0] else "")
    return axes[0]
