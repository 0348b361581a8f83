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
_CURVES = ("#6e7781", "#1f6feb", "#2a9d8f", "#d9822b", "#9b5de5")


def plot_results(
    out: Path, rows: Sequence[Row], group_names: Sequence[str], population: Population
) -> None:
    """Writes `plot.png` and `plot.svg`: a bar per row, and the candidates' validation scores."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
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
        figure = Figure(figsize=(11.5, 0.36 * len(rows) + 1.5), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.45, 1))
        _bars(left, rows, group_names)
        _candidates(right, population)
        for name, options in (("plot.png", {"dpi": 160}), ("plot.svg", {})):
            write_file(out / name, lambda path, o=options: _save(figure, path, o))


def _save(figure: Any, path: Path, options: dict[str, Any]) -> None:
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, facecolor="white", metadata=metadata, **options)


def _bars(axes: Any, rows: Sequence[Row], group_names: Sequence[str]) -> None:
    heights = np.arange(len(rows))[::-1]
    for height, row in zip(heights, rows, strict=True):
        strong = row.kind == "best"
        axes.barh(height, 100 * row.accuracy, 0.66, color=_BARS[row.kind], zorder=1)
        axes.text(
            103,
            height,
            f"{100 * row.accuracy:.1f}",
            va="center",
            fontweight="bold" if strong else "normal",
        )
    for i, group in enumerate(group_names):
        shares = [100 * row.groups[i] for row in rows]
        axes.scatter(
            shares,
            heights,
            s=26,
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
    axes.set_xlabel("accuracy on test digits, %   (bar: all ten digits; dots: each expert's)")
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.45, 1.0),
        ncols=len(group_names),
        frameon=False,
        handletextpad=0.2,
    )
    _clear(axes, "x")


def _candidates(axes: Any, population: Population) -> None:
    order = np.argsort(population.accuracy, kind="stable")[::-1]
    rank = np.empty(len(order), int)
    rank[order] = np.arange(1, len(order) + 1)
    names = np.asarray(population.methods)
    accuracy = 100 * population.accuracy
    for color, name in zip(_CURVES, METHODS, strict=True):
        chosen = names == name
        axes.scatter(
            rank[chosen], accuracy[chosen], s=9, color=color, linewidth=0, alpha=0.8, label=name
        )
    best = population.best
    axes.annotate(
        f"chosen: {names[best]}\n{accuracy[best]:.1f} % on validation",
        (rank[best], accuracy[best]),
        xytext=(0.36, 0.93),
        textcoords="axes fraction",
        va="center",
        fontweight="bold",
        color=_BARS["best"],
        arrowprops={"arrowstyle": "-", "color": _BARS["best"], "linewidth": 1.0},
    )
    axes.set_xlim(-0.02 * len(order), 1.02 * len(order))
    axes.set_ylim(0, 103)
    axes.set_xlabel(f"{len(order):,} merge candidates, sorted; one compiled program")
    axes.set_ylabel("accuracy on validation digits, %")
    axes.legend(loc="lower left", frameon=False, markerscale=2.2, handletextpad=0.2)
    _clear(axes, "y")


def _clear(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis=grid, color=_LINE, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
