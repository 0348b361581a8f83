"""What one search is (static), and what it carries from generation to generation."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmerge.search.space import Space
from jaxmerge.search.strategies.strategy import Strategy

# The axis of a mesh over which a population is spread.
AXIS = "population"


@dataclass(frozen=True)
class Search:
    """The static part of a search.

    Attributes:
      space: what is searched.
      strategy: who searches.
      restarts: how many searches run side by side.
      objectives: how many numbers a candidate's fitness has.
      reevaluate: how many of the best candidates are evaluated again in each generation.
      patience: generations without progress after which the search ends; None: never.
      tolerance: what counts as progress.
      chunk: how many candidates are evaluated at once on each device.
      mesh: the devices, with an axis named "population"; None: the default device.
    """

    space: Space
    strategy: Strategy
    restarts: int
    objectives: int
    reevaluate: int
    patience: int | None
    tolerance: float
    chunk: int
    mesh: Mesh | None

    @property
    def candidates(self) -> int:
        """How many evaluations a generation takes."""
        return self.restarts * (self.strategy.population_size + self.reevaluate)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """What a generation hands to the next one.

    Attributes:
      state: of the strategy, each leaf [restarts, ...].
      best: see `jaxmerge.search.best`.
      stale: int32 [restarts], generations without progress.
      record: float32 [restarts], the fitness from which progress is measured.
      stopped: bool [], whether the search has ended before its time.
      evaluations: int32 [], candidates evaluated so far.
    """

    state: Any
    best: Any
    stale: jax.Array
    record: jax.Array
    stopped: jax.Array
    evaluations: jax.Array


def place(mesh: Mesh | None, tree: Any) -> Any:
    """Puts on all devices of a mesh what does not lie on them yet."""
    if mesh is None:
        return tree
    everywhere = jax.NamedSharding(mesh, jax.P())

    def placed(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == everywhere.device_set:
            return leaf
        if everywhere.is_fully_addressable:
            return jax.device_put(leaf, everywhere)
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            bits = placed(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, everywhere, lambda index: array[index])

    return jax.tree.map(placed, tree)


def replicated(mesh: Mesh | None, array: jax.Array) -> jax.Array:
    """Gives every device the whole array."""
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, jax.NamedSharding(mesh, jax.P()))
