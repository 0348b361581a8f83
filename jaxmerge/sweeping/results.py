"""A sweep's results as files: the best recipe, a table, JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from jaxmerge.recipes import Plan, PlanError, Recipe, dump
from jaxmerge.sweeping.sweep import BALANCE, Sweep

BEST, TABLE, RECORD = "best-recipe.yaml", "results.csv", "results.json"


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises a PlanError where the folder cannot take the results."""
    if folder.exists() and not folder.is_dir():
        raise PlanError([f"{folder}: a file stands where the folder of results is to be made"])
    present = [name for name in (BEST, TABLE, RECORD) if (folder / name).exists()]
    if present and not overwrite:
        raise PlanError(
            [
                f"{folder}: there are results already ({', '.join(present)}); name another "
                "folder, or give --overwrite"
            ]
        )


def part_names(found: Sweep) -> tuple[str, ...]:
    """What a score is made of: the sources' cosines, or tasks."""
    if found.kind == BALANCE:
        resolved = found.grid.resolved
        models = [str(model) for model in resolved.models]
        if found.parts.shape[1] > len(models):
            models.insert(0, str(resolved.base))
        return tuple(f"cos {model}" for model in models)
    return tuple(f"task {i}" for i in range(found.parts.shape[1]))


def to_dict(found: Sweep, plan: Plan) -> dict[str, Any]:
    """Returns the sweep as plain data; a score of NaN is None."""
    best = found.best
    return {
        "method": plan.resolved.method.name,
        "seed": plan.seed,
        "score": found.kind,
        "parts": list(part_names(found)),
        "compiled": found.compiled,
        "batch": found.batch,
        "best": {**_point(found, best), "recipe": dump(found.grid.recipe(best))},
        "points": [_point(found, i) for i in range(len(found.scores))],
        "notes": [*plan.notes, *found.notes],
    }


def standing_alone(recipe: Recipe) -> Recipe:
    """Returns a recipe with absolute paths, so that it may stand in any folder."""
    folder = recipe.folder

    def absolute(reference: Any) -> Any:
        path = os.path.abspath(reference.locate(folder))
        return type(reference)(path, reference.key, reference.revision, reference.lora)

    models = tuple(
        source.model_copy(update={"model": absolute(source.model)}) for source in recipe.models
    )
    base = None if recipe.base_model is None else absolute(recipe.base_model)
    return recipe.model_copy(update={"models": models, "base_model": base})


def write(folder: Path, found: Sweep, plan: Plan) -> None:
    """Writes the best recipe, all points as CSV, and everything as JSON.

    Args:
        folder: made if need be.
        found: the sweep.
        plan: its plan.
    """
    score = found.scores[found.best]
    seed = f" --seed {plan.seed}" if plan.resolved.method.random else ""
    head = (
        f"# Best of {len(found.scores)} points by {_score_name(found)}: {score:.6g}.\n"
        f"# jaxmerge merge {BEST} OUT{seed}\n"
    )
    texts = {
        BEST: head + dump(standing_alone(found.grid.recipe(found.best))),
        TABLE: _csv(found),
        RECORD: json.dumps(to_dict(found, plan), indent=2, allow_nan=False) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def _score_name(found: Sweep) -> str:
    return "the data-free balance score" if found.kind == BALANCE else "the evaluator's score"


def _point(found: Sweep, index: int) -> dict[str, Any]:
    return {
        "values": dict(zip(found.grid.labels, found.grid.points[index].tolist(), strict=True)),
        "score": _number(found.scores[index]),
        "parts": [_number(part) for part in found.parts[index]],
    }


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _csv(found: Sweep) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    # One task's score is the score.
    parts = part_names(found) if found.parts.shape[1] > 1 else ()
    writer.writerow([*found.grid.labels, "score", *parts])
    for index in range(len(found.scores)):
        row = [*found.grid.points[index].tolist(), float(found.scores[index])]
        writer.writerow([*row, *found.parts[index][: len(parts)].tolist()])
    return text.getvalue()
