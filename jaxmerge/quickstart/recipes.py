"""The quickstart's recipes: written as files, run by the path that `jaxmerge merge` takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmerge import methods
from jaxmerge.converters import load_checkpoint
from jaxmerge.quickstart.folder import QuickstartError, write_text
from jaxmerge.recipes import Recipe, dump, make_plan, read, run
from jaxmerge.recipes.dialect import MERGEKIT


def fitting_methods(models: int) -> dict[str, int]:
    """The methods that mergekit's recipes know and that fit the experts, and how many each takes.

    Every registered method would take the quickstart minutes.

    Example:
      >>> found = fitting_methods(3)
      >>> found["ties"], found["slerp"]
      (3, 2)
    """
    found = {}
    for name in sorted(MERGEKIT):
        method = methods.get(name)()
        low, high = method.models
        if low <= models:
            found[name] = models if high is None else min(models, high)
    return found


def default_recipe(name: str, base: str, models: Sequence[str]) -> Recipe:
    """The method as its paper defines it, at the library's defaults."""
    method = methods.get(name)()
    return _recipe(name, base if method.base == "required" else None, models, {})


def exact_recipe(
    name: str,
    base: str,
    models: Sequence[str],
    hyperparams: Mapping[str, float | tuple[float, ...]],
) -> Recipe:
    """A recipe with every number written out."""
    method = methods.get(name)()
    return _recipe(name, base if method.base == "required" else None, models, hyperparams)


def write_recipe(path: Path, recipe: Recipe, comment: str) -> None:
    """Writes a recipe's file under a comment."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    write_text(path, lines + dump(recipe))


def run_recipe(path: Path, out: Path, *, seed: int, sources: Path) -> dict[str, np.ndarray]:
    """Reads a recipe's file, plans, runs, and loads what was written.

    Raises:
      QuickstartError: the recipe's models were found elsewhere than in `sources`.
    """
    plan = make_plan(read(path), out=out, overwrite=True, seed=seed)
    for source in plan.sources:
        # A path is looked up in the working directory first: another file may stand there.
        if source.path.resolve().parent != sources.resolve():
            raise QuickstartError(
                f"{path}: model {source.name!r} was found at {source.path.resolve()}, expected in "
                f"{sources}; run the quickstart from another working directory"
            )
    return load_checkpoint(run(plan))


def _recipe(
    name: str,
    base: str | None,
    models: Sequence[str],
    hyperparams: Mapping[str, float | tuple[float, ...]],
) -> Recipe:
    each = {key: value for key, value in hyperparams.items() if isinstance(value, tuple)}
    listed: list[dict[str, Any]] = [{"model": model} for model in models]
    for i, entry in enumerate(listed):
        if each:
            entry["parameters"] = {key: value[i] for key, value in each.items()}
    shared = {key: value for key, value in hyperparams.items() if not isinstance(value, tuple)}
    return Recipe.model_validate(
        {
            "dialect": "jaxmerge",
            "merge_method": name,
            "base_model": base,
            "models": listed,
            "parameters": shared,
        }
    )
