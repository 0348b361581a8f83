"""NSGA-II: a population that spreads over the front of what no candidate betters."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.search.pareto.sorting import crowding_distance, nondominated_ranks
from jaxmerge.search.pareto.variation import polynomial_mutation, simulated_binary_crossover

if TYPE_CHECKING:
    from jaxmerge.search.space import Space


class Params(NamedTuple):
    """What may be set, traced.

    Attributes:
      crossover: the probability that two parents are crossed at all.
      crossover_index: eta of the simulated binary crossover.
      mutation: the probability that a variable is mutated, times the number of variables.
      mutation_index: eta of the polynomial mutation.
      initial_spread: not used: the first population is spread over the whole space.
    """

    crossover: jax.typing.ArrayLike = 0.9
    crossover_index: jax.typing.ArrayLike = 15.0
    mutation: jax.typing.ArrayLike = 1.0
    mutation_index: jax.typing.ArrayLike = 20.0
    initial_spread: jax.typing.ArrayLike = 0.25


class ParetoState(NamedTuple):
    """The parents.

    Attributes:
      population: float32 [population, size].
      fitness: float32 [population, objectives]; infinite before the first generation is told.
      ranks: int32 [population], their fronts: 0 is the front.
      crowding: float32 [population], the crowding distances.
      generation: int32 [].
    """

    population: jax.Array
    fitness: jax.Array
    ranks: jax.Array
    crowding: jax.Array
    generation: jax.Array


@dataclass(frozen=True)
class NSGA2:
    """Evolves a population towards the Pareto front of several objectives, and keeps the front.

    Children come of parents that win tournaments by front and crowding: simulated binary crossover and polynomial
    mutation for numbers, uniform crossover and redrawing for choices. Of parents and children together the best fronts
    survive, of the last of them the least crowded. `ParetoState.population` where `ranks` is 0 is the front.

    Attributes:
      population_size: at least 2.
      space: the space.
      objectives: how many.

    Raises:
      ValueError: a population of fewer than 2, or no objective.

    Reference:
      Deb, Pratap, Agarwal and Meyarivan, A fast and elitist multiobjective genetic algorithm: NSGA-II, IEEE TEC 2002.
    """

    population_size: int
    space: Space
    objectives: int = 2

    multiobjective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.population_size < 2:
            raise ValueError(
                f"NSGA-II needs a population of at least 2, found {self.population_size}"
            )
        if self.objectives < 1:
            raise ValueError(f"NSGA-II needs at least one objective, found {self.objectives}")

    @property
    def default_params(self) -> Params:
        return Params()

    @functools.partial(jax.jit, static_argnames="self")
    def init(self, key: jax.Array, mean: jax.Array, params: Params) -> ParetoState:
        """The first population: uniform over the space, and one given genome.

        Args:
          key: one key.
          mean: float32 [size], which becomes a candidate.
          params: not used.
        """
        size = self.population_size
        population = jax.random.uniform(key, (size, self.space.size)).at[0].set(mean)
        return ParetoState(
            population=population,
            fitness=jnp.full((size, self.objectives), jnp.inf),
            ranks=jnp.zeros(size, jnp.int32),
            crowding=jnp.zeros(size),
            generation=jnp.zeros((), jnp.int32),
        )

    @functools.partial(jax.jit, static_argnames="self")
    def ask(
        self, key: jax.Array, state: ParetoState, params: Params
    ) -> tuple[jax.Array, ParetoState]:
        """Breeds children; the first time the first population itself.

        Args:
          key: one key.
          state: the parents.
          params: what may be set.

        Returns:
          float32 [population, size] in [0, 1] and the state.
        """
        children = self._bred(key, state, params)
        return jnp.where(state.generation == 0, state.population, children), state

    @functools.partial(jax.jit, static_argnames="self")
    def tell(
        self,
        key: jax.Array,
        population: jax.Array,
        fitness: jax.Array,
        state: ParetoState,
        params: Params,
    ) -> tuple[ParetoState, dict[str, jax.Array]]:
        """Lets the best of parents and children survive.

        Args:
          key: not used.
          population: float32 [population, size], the children.
          fitness: float32 [population, objectives], finite; less is better.
          state: the parents.
          params: not used.

        Returns:
          The state, and how many of the survivors are on the front ("front").
        """
        everyone = jnp.concatenate([state.population, population])
        points = jnp.concatenate([state.fitness, fitness])
        ranks = nondominated_ranks(points, enough=self.population_size)
        # Before the first generation the parents are nowhere: infinite, all on the last front.
        finite = jnp.where(jnp.isfinite(points), points, 0)
        crowding = jnp.where(
            jnp.all(jnp.isfinite(points), axis=1), crowding_distance(finite, ranks), 0
        )
        best = jnp.lexsort((-crowding, ranks))[: self.population_size]
        kept = ParetoState(
            everyone[best], points[best], ranks[best], crowding[best], state.generation + 1
        )
        return kept, {"front": jnp.sum(kept.ranks == 0)}

    def _bred(self, key: jax.Array, state: ParetoState, params: Params) -> jax.Array:
        keys = jax.random.split(key, 7)
        pairs = (self.population_size + 1) // 2
        parents = state.population[self._winners(keys[0], state, 2 * pairs)]
        first, second = parents[:pairs], parents[pairs:]
        crossed = jax.random.bernoulli(keys[1], params.crossover, (pairs, 1))
        # Of the variables half are crossed; a categorical variable's coordinates go together.
        chosen = jax.random.bernoulli(keys[2], 0.5, (pairs, len(self.space.columns)))
        taken = crossed & chosen[:, self._column]
        one, other = simulated_binary_crossover(keys[3], first, second, params.crossover_index)
        one = jnp.where(self._number[None], one, second)
        other = jnp.where(self._number[None], other, first)
        children = jnp.concatenate([jnp.where(taken, one, first), jnp.where(taken, other, second)])[
            : self.population_size
        ]
        columns = len(self.space.columns)
        rate = jnp.minimum(jnp.asarray(params.mutation, jnp.float32) / columns, 0.5)
        mutated = jax.random.bernoulli(keys[4], rate, (self.population_size, columns))
        redrawn = jax.random.uniform(keys[5], children.shape)
        flipped = jnp.where(self._binary[None], 1 - children, redrawn)
        moved = polynomial_mutation(keys[6], children, params.mutation_index)
        changed = jnp.where(self._number[None], moved, flipped)
        return jnp.where(mutated[:, self._column], changed, children)

    def _winners(self, key: jax.Array, state: ParetoState, count: int) -> jax.Array:
        """Of two drawn candidates the one on the better front, or else the less crowded."""
        a, b = jax.random.randint(key, (2, count), 0, self.population_size)
        better = (state.ranks[b] < state.ranks[a]) | (
            (state.ranks[b] == state.ranks[a]) & (state.crowding[b] > state.crowding[a])
        )
        return jnp.where(better, b, a)

    @functools.cached_property
    def _column(self) -> np.ndarray:
        """The scalar variable of each coordinate."""
        widths = [column.width for column in self.space.columns]
        return np.repeat(np.arange(len(widths)), widths)

    @functools.cached_property
    def _number(self) -> np.ndarray:
        """Which coordinates are a continuous or an integer variable's."""
        return self._of("continuous", "integer")

    @functools.cached_property
    def _binary(self) -> np.ndarray:
        return self._of("binary")

    def _of(self, *kinds: str) -> np.ndarray:
        return np.array([column.kind in kinds for column in self.space.columns])[self._column]
