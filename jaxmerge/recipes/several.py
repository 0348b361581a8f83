"""Several merges in one file, which may use each other by their names."""

from __future__ import annotations

import graphlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jaxmerge.recipes.errors import PlanError
from jaxmerge.recipes.output import is_file
from jaxmerge.recipes.plan import Plan
from jaxmerge.recipes.planning import make_plan
from jaxmerge.recipes.resolve import Resolved, resolve
from jaxmerge.recipes.schema import Recipe

# The folder of the merge that has no name.
FINAL = "final"


def make_plans(
    recipes: Sequence[Recipe],
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    memory_limit: int | None = None,
) -> tuple[Plan, ...]:
    """Makes the plans of all merges of a file, in an order in which each comes after those that it uses.

    One merge goes to `out` itself. Of several each goes to a folder in it: `out/name`, the one without
    a name to `out/final`.

    Args:
        recipes: as `read_all` gives them.
        out: as for `make_plan`; where there are several, a folder.
        overwrite: as for `make_plan`.
        seed: as for `make_plan`.
        memory_limit: as for `make_plan`.

    Raises:
        RecipeError: a recipe cannot be resolved.
        PlanError: names that repeat or merges that use each other in a circle; else as for `make_plan`.
    """
    if len(recipes) == 1:
        (recipe,) = recipes
        plan = make_plan(recipe, out=out, overwrite=overwrite, seed=seed, memory_limit=memory_limit)
        return (plan,)
    if out is not None and is_file(Path(out)):
        raise PlanError([f"{out}: {len(recipes)} merges need a folder, which gets one for each"])
    names = [recipe.name or FINAL for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise PlanError([f"{names.count(name)} merges have the name {name!r}"])
    resolved = {name: resolve(recipe) for name, recipe in zip(names, recipes, strict=True)}
    plans: dict[str, Plan] = {}
    for name in _in_order(resolved):
        plans[name] = make_plan(
            resolved[name],
            out=None if out is None else Path(out) / name,
            overwrite=overwrite,
            seed=seed,
            memory_limit=memory_limit,
            # Without a place to go to a merge is shown by its name.
            merged={
                other: plan if plan.output else replace(plan, output=Path(other))
                for other, plan in plans.items()
            },
        )
    return tuple(plans.values())


def _in_order(resolved: dict[str, Resolved]) -> list[str]:
    sorter = graphlib.TopologicalSorter({name: _used(one) for name, one in resolved.items()})
    try:
        order = list(sorter.static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(map(repr, error.args[1]))
        raise PlanError([f"merges use each other in a circle: {circle}"]) from None
    return [name for name in order if name in resolved]


def _used(resolved: Resolved) -> list[str]:
    parts = [model.reference for part in resolved.parts for model in part.sources]
    return sorted({reference.path for reference in (resolved.donor, *parts)})
