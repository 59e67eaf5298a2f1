"""What all plots share: axes to draw on, colors that keep their meaning, runs side by side."""

from collections.abc import Callable, Iterator
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
"""Tokens above and below the threshold, in every plot; of Okabe and Ito's palette, told apart by the color blind."""
RIGHT, WRONG = "#009E73", "#CC79A7"
"""Completions with a right and with a wrong answer."""
RUN_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
SEQUENTIAL = "cividis"

ABOVE = "the last bin has all above"
COLLECTION_LABEL = "rollout collection (number)"
ENTROPY_LABEL = "token entropy (nats)"


def axes_for(ax: Axes | None) -> Axes:
    """The given axes, or those of a new figure."""
    return plt.subplots(figsize=(6.4, 3.8), layout="constrained")[1] if ax is None else ax


def entropy_edges(entropies: pd.Series, bins: int) -> np.ndarray:
    """Borders of ``bins`` bins from 0 to the entropy that 99.5 % of the tokens stay below, nats.

    A few tokens far above would press all others into the first bin; plots count them in the last one, and say so.
    """
    return np.linspace(0.0, max(float(entropies.quantile(0.995)), 1e-3), bins + 1)


def by_run(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, str]]:
    """Each run's name, rows and color, in the order of the frame."""
    for number, name in enumerate(frame["run"].unique()):
        yield name, frame[frame["run"] == name], RUN_COLORS[number % len(RUN_COLORS)]


def require_one_run(frame: pd.DataFrame, what: str) -> None:
    """Refuse a frame with the rows of several runs.

    Raises:
        UserError: naming them
    """
    runs = frame["run"].unique()
    if len(runs) > 1:
        raise UserError(f"{what} draws one run, got {', '.join(runs)}. Use side_by_side({what}, frame), or choose one.")


def finish(ax: Axes, *, x: str, y: str, title: str = "", legend: bool = False) -> Axes:
    """Label the axes, and drop what carries nothing; the legend stands below, where it covers nothing."""
    ax.set(xlabel=x, ylabel=y, title=title)
    ax.spines[["top", "right"]].set_visible(False)
    if legend and (number := len(ax.get_legend_handles_labels()[0])) > 0:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=min(number, 2), frameon=False)
    return ax


def side_by_side(draw: Callable[..., Axes], frame: pd.DataFrame, *others: pd.DataFrame, **options: Any) -> np.ndarray:
    """Draw each run of the frame on axes of its own, of one scale, and return these.

    Args:
        draw: a plot of ``training_plots`` or ``token_plots``
        frame: its frame, with the rows of several runs
        others: the further frames that it takes
        options: its keyword arguments
    """
    runs = list(frame["run"].unique())
    size = (max(4.2 * len(runs), 6.4), 3.8)
    _, axes = plt.subplots(1, len(runs), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    for ax, run in zip(axes[0], runs, strict=True):
        draw(*(part[part["run"] == run] for part in (frame, *others)), ax=ax, **options)
        ax.set_title(run)
    for ax in axes[0, 1:]:
        ax.set_ylabel("")
    return axes[0]
