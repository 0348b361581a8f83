"""A search's pictures: how it converged, and the front that it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_INK, _MUTED, _BEST = "#1f2328", "#8c9aa8", "#1f6feb"


def plot_convergence(path: Path, history: Mapping[str, np.ndarray]) -> None:
    """Draws the best, the generation's best and the mean objective over the evaluations.

    Args:
        path: a .png file, written beside and renamed.
        history: of `evolve`.
    """
    objectives = [name.removeprefix("best") for name in history if name.startswith("best")]
    figure, axes = _figure(len(objectives))
    for axis, suffix in zip(axes, objectives, strict=True):
        evaluations = history["evaluations"]
        axis.plot(evaluations, history[f"mean{suffix}"], color=_MUTED, lw=1, label="mean")
        axis.plot(
            evaluations,
            _finite(history[f"generation_best{suffix}"]),
            color=_MUTED,
            lw=0,
            marker=".",
            label="best of the generation",
        )
        axis.plot(evaluations, _finite(history[f"best{suffix}"]), color=_BEST, label="best so far")
        axis.set_xlabel("evaluations")
        axis.set_ylabel(f"objective {suffix.removeprefix('_')}".strip() + " (less is better)")
        axis.legend(frameon=False)
    _save(figure, path)


def plot_front(path: Path, scores: np.ndarray, names: Sequence[str]) -> None:
    """Draws the first two scores of the front's points.

    Args:
        path: a .png file, written beside and renamed.
        scores: [points, scores], more is better.
        names: of the scores.
    """
    figure, (axis,) = _figure(1)
    order = np.argsort(scores[:, 0])
    axis.plot(scores[order, 0], scores[order, 1], color=_BEST, marker="o", lw=0.5)
    axis.set_xlabel(names[0])
    axis.set_ylabel(names[1])
    _save(figure, path)


def _figure(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * count, 4.2), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=_INK)
    return figure, axes


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=120, metadata={"Software": None})
    partial.replace(path)
