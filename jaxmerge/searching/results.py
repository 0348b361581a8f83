"""The folder of a search's results: recipes, history, choices, plots."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxmerge._version import __version__
from jaxmerge.recipes import dump
from jaxmerge.searching.plots import plot_convergence, plot_front
from jaxmerge.searching.running import Found, write_text
from jaxmerge.sweeping.results import standing_alone

BEST, HISTORY, RECORD, CHOICES = "best-recipe.yaml", "history.csv", "results.json", "choices.csv"
FRONT, FRONT_TABLE = "front", "front.csv"
CONVERGENCE, FRONT_PLOT = "convergence.png", "front.png"
FILES = (BEST, HISTORY, RECORD, CHOICES, FRONT_TABLE, CONVERGENCE, FRONT_PLOT)


def write_results(out: Path, found: Found) -> None:
    """Writes everything that a search found, each file beside and renamed.

    `best-recipe.yaml` (which `jaxmerge merge` runs), `history.csv` (a row for each generation), `choices.csv` (what
    each block is merged by), `results.json` and `convergence.png`. Of several objectives also `front.csv`, `front.png`
    and a recipe for each point in `front/`.

    Args:
        out: the folder.
        found: what `run_search` returned.
    """
    task, best = found.task, found.best
    seed = f" --seed {task.plan.seed}" if _is_random(found) else ""
    names = ", ".join(
        f"{name} {value:.6g}"
        for name, value in zip(task.scoring.names, found.scores[best], strict=True)
    )
    head = (
        f"# Best of {found.result.evaluations} candidates by {found.strategy}: {names}.\n"
        f"# jaxmerge merge {BEST} OUT{seed}\n"
    )
    write_text(out / BEST, head + dump(standing_alone(task.recipe(found.points[best]))))
    history = found.result.history
    write_text(out / HISTORY, _csv(["generation", *history], _rows(history)))
    write_text(out / CHOICES, _csv(["block", "method", "hyperparameter", "value"], _choices(found)))
    write_text(out / RECORD, json.dumps(to_dict(found), indent=2, allow_nan=False) + "\n")
    plot_convergence(out / CONVERGENCE, history)
    if task.objectives > 1:
        folder = out / FRONT
        folder.mkdir(exist_ok=True)
        rows = []
        for i, (point, scores) in enumerate(zip(found.points, found.scores, strict=True)):
            name = f"{i:03d}.yaml"
            write_text(folder / name, dump(standing_alone(task.recipe(point))))
            rows.append([f"{FRONT}/{name}", *scores.tolist()])
        write_text(out / FRONT_TABLE, _csv(["recipe", *task.scoring.names], rows))
        plot_front(out / FRONT_PLOT, found.scores, task.scoring.names)


def to_dict(found: Found) -> dict[str, Any]:
    """Returns the search as plain data."""
    task, result = found.task, found.result
    return {
        "version": __version__,
        "strategy": found.strategy,
        "space": {
            path: {"kind": variable.kind, "shape": list(variable.shape)}
            for path, variable in task.space.variables
        },
        "seed": task.search.seed,
        "generations": result.generations,
        "evaluations": result.evaluations,
        "stopped_early": result.stopped,
        "compiled": task.scoring.traced,
        "scores": list(task.scoring.names),
        "best": _point(found, found.best),
        "front": (
            [_point(found, i) for i in range(len(found.points))] if task.objectives > 1 else None
        ),
        "history": {
            name: [_number(value) for value in values] for name, values in result.history.items()
        },
        "notes": [*task.plan.notes, *task.scoring.notes],
    }


def _point(found: Found, index: int) -> dict[str, Any]:
    choices = found.task.choices(found.points[index])
    return {
        "scores": [_number(value) for value in found.scores[index]],
        "blocks": {
            label: {"method": method, "options": options, "parameters": parameters}
            for label, (method, options, parameters) in choices.items()
        },
    }


def _choices(found: Found) -> Iterable[Sequence[Any]]:
    for label, (method, _, parameters) in found.task.choices(found.points[found.best]).items():
        if not parameters:
            yield [label, method, "", ""]
        for name, value in parameters.items():
            values = value if isinstance(value, list) else [value]
            yield [label, method, name, " ".join(f"{one:.6g}" for one in values)]


def _rows(history: dict[str, Any]) -> Iterable[Sequence[Any]]:
    for i, row in enumerate(zip(*history.values(), strict=True), start=1):
        yield [i, *(f"{value:.7g}" for value in row)]


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _is_random(found: Found) -> bool:
    return any(method.random for _, _, method in found.task.members.values())
