"""Strategies by name: our own and those of evosax."""

import functools
import importlib

from jaxmerge.search.space import Space
from jaxmerge.search.strategies.strategy import Strategy
from jaxmerge.tree import nearest

__all__ = ["Strategy", "strategy", "strategy_names"]

# name: module and class, in this package.
_OWN = {
    "random": ("random_search", "RandomSearch"),
    "sobol": ("sobol", "Sobol"),
}


def strategy(name: str, population: int, space: Space) -> Strategy:
    """Gives a strategy by name.

    Args:
      name: one of `strategy_names`; case, underscores and hyphens do not count.
      population: how many candidates a generation has.
      space: what is searched.

    Returns:
      The strategy; equal arguments give the same object.

    Raises:
      ValueError: no such strategy, or a population that it cannot take.

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
    return _made(found, population, space)


def strategy_names() -> list[str]:
    """The names of all strategies: our own, then evosax's."""
    from jaxmerge.search.strategies.from_evosax import evosax_names

    own = {_bare(name) for name in _OWN}
    return [*_OWN, *[name for name in evosax_names() if _bare(name) not in own]]


@functools.lru_cache(maxsize=256)
def _made(name: str, population: int, space: Space) -> Strategy:
    if name in _OWN:
        module, kind = _OWN[name]
        found = importlib.import_module(f"jaxmerge.search.strategies.{module}")
        return getattr(found, kind)(population, space)
    from jaxmerge.search.strategies.from_evosax import FromEvosax

    return FromEvosax(population, space, name)


def _bare(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
