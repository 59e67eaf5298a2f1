"""Forest plot of a comparison: the difference of each method to the baseline, with its interval."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from egspo_lightning.analysis.comparison_table import Row


def forest_plot(rows: Sequence[Row], baseline: str, title: str) -> Figure:
    """One line for each method that was compared with the baseline, in points of accuracy, the first one on top."""
    compared = [(row.label, row.difference) for row in rows if row.difference is not None]
    figure = Figure(figsize=(7.0, 1.1 + 0.32 * len(compared)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0.0, color="0.6", linewidth=1.0)
    for place, (_, difference) in enumerate(compared):
        low, mean, high = (100 * value for value in (difference.low, difference.mean, difference.high))
        is_clear = low > 0 or high < 0
        color = "tab:blue" if is_clear else "0.4"
        axes.plot([low, high], [place, place], color=color, linewidth=2.0, solid_capstyle="butt")
        axes.plot([mean], [place], "o", color=color, markersize=6)
    axes.set_yticks(range(len(compared)), [label for label, _ in compared])
    axes.invert_yaxis()
    axes.set_xlabel(f"held-out accuracy minus {baseline}, points (95 % interval; blue: without 0)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure
