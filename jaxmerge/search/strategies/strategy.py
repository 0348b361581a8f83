"""What a strategy is: an optimiser that asks for a population's fitness and is told it."""

from typing import Any, Protocol

import jax

from jaxmerge.search.space import Space


class Strategy(Protocol):
    """A strategy for `evolve`; it minimises. Compares by value, and may be a static argument.

    All methods are pure functions of arrays. The state is a flat pytree of arrays of fixed shapes and dtypes, so that
    it runs inside `lax.scan`, under `vmap` over restarts, and is kept in checkpoints.

    Attributes:
      population_size: how many genomes `ask` returns.
      space: what is searched.
      multiobjective: whether fitness is [population, objectives] rather than [population].
      default_params: numbers that may be traced; a NamedTuple with at least `initial_spread`, the standard deviation
        in [0, 1] with which a search sets out.
    """

    @property
    def population_size(self) -> int:
        """See above."""

    @property
    def space(self) -> Space:
        """See above."""

    @property
    def multiobjective(self) -> bool:
        """See above."""

    @property
    def default_params(self) -> Any:
        """See above."""

    def init(self, key: jax.Array, mean: jax.Array, params: Any) -> Any:
        """Starts at a genome [size]; returns the state."""

    def ask(self, key: jax.Array, state: Any, params: Any) -> tuple[jax.Array, Any]:
        """Returns a population, float32 [population, size], and the state."""

    def tell(
        self, key: jax.Array, population: jax.Array, fitness: jax.Array, state: Any, params: Any
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Takes the fitness of what `ask` returned, all finite; returns the state and scalars worth recording."""
