"""Runs a search into a folder, which a later call goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmerge.recipes import PlanError
from jaxmerge.search import Result, evolve, strategy
from jaxmerge.search.evolve import Progress
from jaxmerge.searching.schema import SearchFile, parse_search
from jaxmerge.searching.task import Task

CHECKPOINTS = "checkpoints"
COPY = "search.yaml"

# Above this many coordinates the covariance of all pairs costs more than it gives.
_MOST_FOR_COVARIANCE = 100


@dataclass(frozen=True)
class Found:
    """A search that has ended.

    Attributes:
        task: what was searched.
        strategy: by which strategy.
        result: what `evolve` returned.
        points: the points found, the best first: one, or the front of several objectives.
        scores: float64 [points, scores], more is better.
    """

    task: Task
    strategy: str
    result: Result
    points: tuple[Any, ...]
    scores: np.ndarray

    @property
    def best(self) -> int:
        """The point with the best mean score."""
        return int(np.argmax(self.scores.mean(axis=1)))


def prepare_folder(out: Path, text: str, *, resume: bool, overwrite: bool) -> None:
    """Makes the folder of results, or checks that it is that of this search.

    Args:
        out: the folder.
        text: of the search file.
        resume: go on from what is there.
        overwrite: begin anew where something is there.

    Raises:
        PlanError: something is there and neither is asked for; nothing is there to go on from, or another search.
    """
    if out.exists() and not out.is_dir():
        raise PlanError([f"{out}: a file stands where the folder of results is to be made"])
    copy = out / COPY
    if resume:
        if not copy.exists():
            raise PlanError([f"{out}: there is no search to go on from"])
        before, now = (
            _identity(parse_search(one)) for one in (copy.read_text(encoding="utf-8"), text)
        )
        for key, value in now.items():
            if before[key] != value:
                raise PlanError(
                    [
                        f"{out}: `{key}` was {before[key]!r}, is {value!r} now; a search goes on "
                        "only as it began (the budget may grow)"
                    ]
                )
    elif out.exists() and any(out.iterdir()):
        if not copy.exists() or not overwrite:
            hint = "; give --resume to go on, --overwrite to begin anew" if copy.exists() else ""
            raise PlanError([f"{out}: the folder is not empty{hint}"])
        clear(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(copy, text)


def run_search(task: Task, out: Path, *, progress: Progress | None = None) -> Found:
    """Runs a search, from where its folder's checkpoint has got to.

    Args:
        task: of `make_task`.
        out: the folder, as `prepare_folder` left it; gets checkpoints.
        progress: as for `evolve`.

    Raises:
        ValueError: a budget below one generation, or a population that the strategy cannot take.
    """
    search = task.search
    name = strategy_of(task)
    cost = (search.population + search.reevaluate) * search.restarts
    generations = search.budget // cost
    if generations < 1:
        raise search.error(
            f"the budget of {search.budget} is below one generation, which takes {cost} evaluations",
            "budget",
        )
    try:
        strategy(name, search.population, task.space, task.objectives)
    except ValueError as error:
        raise search.error(str(error), "strategy") from None
    result = evolve(
        task.objective(),
        task.space,
        strategy=name,
        population=search.population,
        generations=generations,
        key=jax.random.key(search.seed),
        args=task.scoring.args,
        restarts=search.restarts,
        checkpoint=out / CHECKPOINTS,
        every=10 if task.scoring.traced else 1,
        host=not task.scoring.traced,
        reevaluate=search.reevaluate,
        patience=search.patience,
        objectives=task.objectives,
        progress=progress,
    )
    if task.objectives == 1:
        points: tuple[Any, ...] = (result.best,)
    else:
        points = tuple(
            jax.tree.map(lambda leaf, i=i: leaf[i], result.best) for i in range(len(result.genome))
        )
    scores = np.stack([task.scores(point) for point in points])
    return Found(task, name, result, points, scores)


def strategy_of(task: Task) -> str:
    """The strategy that a search names, else one that fits its space."""
    if task.search.strategy is not None:
        return task.search.strategy
    if task.objectives > 1:
        return "nsga2"
    if any(column.kind != "continuous" for column in task.space.columns):
        return "catcma"
    return "CMA_ES" if task.space.size <= _MOST_FOR_COVARIANCE else "Sep_CMA_ES"


def write_text(path: Path, text: str) -> None:
    """Writes a file beside, and renames it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def clear(out: Path) -> None:
    """Removes the results of an earlier search."""
    import shutil

    from jaxmerge.searching.results import FILES, FRONT

    for name in (CHECKPOINTS, FRONT):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (COPY, *FILES):
        (out / name).unlink(missing_ok=True)


def _identity(search: SearchFile) -> dict[str, Any]:
    return {name: getattr(search, name) for name in SearchFile.model_fields if name != "budget"}
