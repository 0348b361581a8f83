"""Strategies by name: our own and those of evosax."""

import functools
import importlib
from typing import Any

from jaxmerge.search.space import Space
from jaxmerge.search.strategies.strategy import Strategy
from jaxmerge.tree import nearest

__all__ = ["Strategy", "strategy", "strategy_names"]

# name: module and class, below jaxmerge.search.
_OWN = {
    "random": ("strategies.random_search", "RandomSearch"),
    "sobol": ("strategies.sobol", "Sobol"),
    "margin": ("strategies.margin", "MarginCMAES"),
    "catcma": ("strategies.catcma", "CatCMA"),
    "umda": ("strategies.umda", "UMDA"),
    "nsga2": ("pareto.nsga2", "NSGA2"),
}


def strategy(name: str, population: int, space: Space, objectives: int = 1) -> Strategy:
    """Gives a strategy by name.

    Args:
      name: one of `strategy_names`; case, underscores and hyphens do not count.
      population: how many candidates a generation has.
      space: what is searched.
      objectives: how many numbers fitness has.

    Returns:
      The strategy; equal arguments give the same object.

    Raises:
      ValueError: no such strategy, a population that it cannot take, or a number of objectives.

    Example:
      >>> import jaxmerge as jm
      >>> space = jm.search.space({"weight": jm.search.continuous(0.0, 1.0, shape=(3,))})
      >>> strategy("Sep-CMA-ES", 8, space) is strategy("sep_cma_es", 8, space)
      True
    """
    names = {_bare(one): one for one in strategy_names()}
    found = names.get(_bare(name))
    if found is None:
        hint = nearest(_bare(name), names)
        for bare, one in names.items():
            hint = hint.replace(repr(bare), repr(one))
        raise ValueError(f"there is no strategy {name!r}{hint}")
    if population < 1:
        raise ValueError(f"a population needs at least 1 candidate, found {population}")
    return _made(found, population, space, objectives)


def strategy_names() -> list[str]:
    """The names of all strategies: our own, then evosax's."""
    from jaxmerge.search.strategies.from_evosax import evosax_names

    own = {_bare(name) for name in _OWN}
    return [*_OWN, *[name for name in evosax_names() if _bare(name) not in own]]


@functools.lru_cache(maxsize=256)
def _made(name: str, population: int, space: Space, objectives: int) -> Strategy:
    if name not in _OWN:
        from jaxmerge.search.strategies.from_evosax import FromEvosax

        kind: Any = functools.partial(FromEvosax, algorithm=name)
        several = FromEvosax.multiobjective
    else:
        module, attribute = _OWN[name]
        kind = getattr(importlib.import_module(f"jaxmerge.search.{module}"), attribute)
        several = kind.multiobjective
    if several and objectives < 2:
        raise ValueError(f"{name} needs several objectives; say how many by objectives=")
    if objectives > 1 and not several:
        raise ValueError(f"{name} takes one objective, not {objectives}; 'nsga2' takes several")
    return kind(population, space, objectives) if several else kind(population, space)


def _bare(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
