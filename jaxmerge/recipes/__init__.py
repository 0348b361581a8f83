"""Recipes: what to merge, written down; planned from headers, then run over checkpoints."""

from jaxmerge.recipes.errors import PlanError, RecipeError
from jaxmerge.recipes.plan import Plan
from jaxmerge.recipes.planning import make_plan
from jaxmerge.recipes.reproducing import Reproduction, reproduce
from jaxmerge.recipes.resolve import Resolved, resolve
from jaxmerge.recipes.run import load_sources, run
from jaxmerge.recipes.schema import Recipe, dump, parse, parse_all, read, read_all
from jaxmerge.recipes.several import make_plans

__all__ = [
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Reproduction",
    "Resolved",
    "dump",
    "load_sources",
    "make_plan",
    "make_plans",
    "parse",
    "parse_all",
    "read",
    "read_all",
    "reproduce",
    "resolve",
    "run",
]
