"""The quickstart's picture: who knows which digits, and what the search found."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge.quickstart.folder import write_file
from jaxmerge.quickstart.population import METHODS, Population
from jaxmerge.quickstart.result import Row

_INK, _MUTED, _LINE = "#1f2328", "#6e7781", "#d8dee4"
_BARS = {
    "source": "#b6c2cf",
    "ensemble": "#8c9aa8",
    "method": "#7fb2e5",
    "best": "#1f6feb",
    "reference": "#e4e8ec",
}
_DOTS = ("#d9822b", "#2a9d8f", "#9b5de5")
_CURVES = (
    ("#6e7781", "-"),
    ("#54aeff", "-"),
    ("#0550ae", "-"),
    ("#ff8182", (0, (4, 1.5))),
    ("#a40e26", (0, (4, 1.5))),
)


def plot_results(
    out: Path, rows: Sequence[Row], group_names: Sequence[str], population: Population
) -> None:
    """Writes `plot.png` and `plot.svg`: a bar per row, and the candidates' validation scores."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _LINE,
        "xtick.color": _MUTED,
        "ytick.color": _INK,
        # Equal results give equal files.
        "svg.hashsalt": "jaxmerge",
    }
    with matplotlib.rc_context(settings):
        layout = ConstrainedLayoutEngine(wspace=0.05)
        figure = Figure(figsize=(12, 0.36 * len(rows) + 1.7), layout=layout)
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        _bars(left, rows, group_names)
        _candidates(right, population)
        write_file(out / "plot.png", lambda path: _save(figure, path, {"Software": None}))
        write_file(out / "plot.svg", lambda path: _save(figure, path, {"Date": None}))


def _save(figure: Any, path: Path, metadata: dict[str, None]) -> None:
    figure.savefig(path, dpi=160, facecolor="white", metadata=metadata)


def _bars(axes: Any, rows: Sequence[Row], group_names: Sequence[str]) -> None:
    heights = np.arange(len(rows))[::-1]
    for height, row in zip(heights, rows, strict=True):
        strong = row.kind == "best"
        axes.barh(height, 100 * row.accuracy, 0.66, color=_BARS[row.kind], zorder=1)
        axes.text(
            103,
            height,
            f"{100 * row.accuracy:.1f}",
            va="center_baseline",
            fontweight="bold" if strong else "normal",
        )
    # Apart by height, so that equal shares do not hide each other.
    lifts = np.linspace(0.19, -0.19, len(group_names))
    for i, group in enumerate(group_names):
        shares = [100 * row.groups[i] for row in rows]
        axes.scatter(
            shares,
            heights + lifts[i],
            s=24,
            color=_DOTS[i % len(_DOTS)],
            edgecolor="white",
            linewidth=0.8,
            label=f"digits {group}",
            zorder=3,
            clip_on=False,
        )
    axes.set_yticks(heights, [row.name for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.kind == "best" else "normal")
    axes.set_xlim(0, 112)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("right on the test digits, %")
    _title(axes, "Each model on the test digits", "bar: all ten digits")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 0.995),
        ncols=len(group_names),
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.0,
        borderaxespad=0.2,
    )
    _clear(axes, "x")


def _candidates(axes: Any, population: Population) -> None:
    names = np.asarray(population.methods)
    accuracy = 100 * population.accuracy
    best = population.best
    for (color, style), name in zip(_CURVES, METHODS, strict=True):
        scores = np.sort(accuracy[names == name])[::-1]
        place = np.linspace(0, 100, len(scores))
        axes.plot(place, scores, color=color, linestyle=style, linewidth=1.8, label=name)
    axes.plot(0, accuracy[best], "o", color=_BARS["best"], markersize=8, clip_on=False, zorder=4)
    axes.annotate(
        f"chosen: {names[best]}, {accuracy[best]:.1f} %",
        (0, accuracy[best]),
        xytext=(9, 9),
        textcoords="offset points",
        fontweight="bold",
        color=_BARS["best"],
    )
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 103)
    axes.set_xlabel("each method's candidates from best to worst, %")
    axes.set_ylabel("right on the validation digits, %")
    _title(axes, f"{len(names):,} merges in one compiled program", "random hyperparameters")
    axes.legend(loc="lower left", frameon=False)
    _clear(axes, "y")


def _title(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11.5, pad=22)
    axes.annotate(
        below,
        (0, 1),
        xytext=(0, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        color=_MUTED,
    )


def _clear(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis=grid, color=_LINE, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
