"""The pictures of the section on quality, as small SVG files; each function gives the name that RESULTS.md shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from alignment_sections import landscape
from alignment_sections.merging import ACTIVATION, ALPHAS, AVERAGE, HALF, WEIGHT
from alignment_sections.pairs import Pair

matplotlib.use("Agg")
# The same figures give the same bytes.
matplotlib.rcParams.update({"svg.hashsalt": "jaxmerge", "svg.fonttype": "none", "font.size": 8})

from matplotlib import pyplot  # noqa: E402

Pairs = Mapping[str, Sequence[Pair]]
Labels = Mapping[str, str]


def over_alpha(folder: Path, dataset: str, title: str, labels: Labels, pairs: Pairs) -> str:
    """Joint accuracy on the validation images over alpha."""
    figure, all_axes = _panels(1, len(pairs))
    alphas = (0.0, *ALPHAS, 1.0)
    for axes, (name, found) in zip(all_axes[0], pairs.items(), strict=True):
        values = np.array([one.validation for one in found])
        axes.plot(alphas, values.T, color="0.8", linewidth=1)
        axes.plot(alphas, values.mean(0), marker="o", markersize=3)
        axes.set_title(f"{title}, {labels[name]}")
        axes.set_xlabel("alpha (0: activations, 1: weights)")
    all_axes[0][0].set_ylabel("joint validation accuracy, %")
    return _save(figure, folder, "alpha", dataset, pairs)


def barriers(folder: Path, dataset: str, title: str, labels: Labels, pairs: Pairs) -> str:
    """The tasks' mean loss between both networks, before and after alignment."""
    figure, all_axes = _panels(1, len(pairs))
    t = np.linspace(0, 1, landscape.POINTS)
    for axes, (name, found) in zip(all_axes[0], pairs.items(), strict=True):
        for method in (AVERAGE, WEIGHT, ACTIVATION, HALF):
            losses = np.mean([np.mean(one.lines[method], -1) for one in found], 0)
            axes.plot(t, losses, label="not aligned" if method == AVERAGE else method)
        axes.set_title(f"{title}, {labels[name]}")
        axes.set_xlabel("from one network to the other")
    all_axes[0][0].set_ylabel("mean loss of both tasks, nats")
    all_axes[0][0].legend()
    return _save(figure, folder, "barrier", dataset, pairs)


def planes(folder: Path, dataset: str, title: str, labels: Labels, pairs: Pairs) -> str:
    """The first pair's losses around the merged model: their mean, and where each task's is low."""
    figure, all_axes = _panels(2, len(pairs))
    steps = np.linspace(-landscape.REACH, landscape.REACH, landscape.GRID)
    for column, (name, found) in enumerate(pairs.items()):
        for row, method in enumerate((AVERAGE, HALF)):
            axes: Any = all_axes[row][column]
            losses = np.asarray(found[0].planes[method])
            axes.contourf(steps, steps, losses.mean(-1), 8, cmap="Greys_r")
            for task, color in enumerate(("tab:orange", "tab:blue")):
                low = [landscape.LOW]
                axes.contour(steps, steps, losses[..., task], low, colors=color)
            axes.plot([-1, 0, 1], [0, 0, 0], "k.", markersize=3)
            axes.set_title(f"{labels[name]}, {'not aligned' if row == 0 else method}")
    figure.suptitle(f"{title}: mean loss (lighter is higher); within the lines one task's is low")
    return _save(figure, folder, "plane", dataset, pairs)


def _panels(rows: int, columns: int) -> tuple[Any, Any]:
    return pyplot.subplots(rows, columns, figsize=(2.6 * columns, 2.4 * rows), squeeze=False)


def _save(figure: Any, folder: Path, kind: str, dataset: str, pairs: Pairs) -> str:
    path = folder / f"{'-'.join((kind, dataset, *pairs))}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return f"{path.parent.name}/{path.name}"
