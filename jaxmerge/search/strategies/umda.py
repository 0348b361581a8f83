"""UMDA: every variable on its own, told by the better half of those candidates in which it was active."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.search.strategies.levels import Levels
from jaxmerge.search.strategies.ranking import by_rank, elite

if TYPE_CHECKING:
    from jaxmerge.search.space import Space

NARROWEST, WIDEST = 1e-6, 1.0
"""Between which every standard deviation is held."""


class Params(NamedTuple):
    """What may be set, traced.

    Attributes:
      initial_spread: the first standard deviation of the coordinates of numbers; the range of each is [0, 1].
      inertia: how many candidates the distribution before the update counts for.
    """

    initial_spread: jax.typing.ArrayLike = 0.25
    inertia: jax.typing.ArrayLike = 1.0


class MarginalState(NamedTuple):
    """The marginal distributions, float32.

    Attributes:
      mean: of the continuous variables, [continuous].
      deviation: their standard deviations, [continuous].
      table: of the others, probabilities [discrete, most levels].
    """

    mean: jax.Array
    deviation: jax.Array
    table: jax.Array


@dataclass(frozen=True)
class UMDA:
    r"""Estimates the marginal distribution of every variable from the better half of the candidates.

    .. math:: q_i \leftarrow \frac{\kappa q_i + \mu \sum_k w_k a_{ki} c_{ki}}{\kappa + \mu \sum_k w_k a_{ki}}

    with w the weights by rank, mu = 1 / sum w^2 how many candidates they are worth, c the levels as ones among zeros,
    a = 1 where the variable was active, and kappa the inertia. Mean and variance of a continuous variable (the latter
    about the mean before the update, so that it grows along the way) are estimated in the same manner: conditional on
    the variable's being active. What no candidate had active stays. A level keeps a probability of at least
    1 / (n (levels - 1)), with n the number of discrete variables (2 at least).

    No dependence between variables is learned but the conditions themselves. Integers are tables too: for many levels
    `CatCMA` or `MarginCMAES` need fewer evaluations.

    Attributes:
      population_size: at least 2.
      space: the space.

    Raises:
      ValueError: a population of fewer than 2.

    Reference:
      Mühlenbein and Paaß, From recombination of genes to the estimation of distributions, PPSN 1996. Larrañaga and
      Lozano, Estimation of distribution algorithms, 2002 (UMDA_c). Conditions and inertia: our own.
    """

    population_size: int
    space: Space

    multiobjective: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.population_size < 2:
            raise ValueError(f"UMDA needs a population of at least 2, found {self.population_size}")

    @property
    def default_params(self) -> Params:
        return Params()

    @functools.partial(jax.jit, static_argnames="self")
    def init(self, key: jax.Array, mean: jax.Array, params: Params) -> MarginalState:
        """The distribution around a genome.

        Args:
          key: not used.
          mean: float32 [size]; its coordinates are the probabilities of binary variables and in proportion to those of
            categorical ones.
          params: what may be set.
        """
        spread = jnp.asarray(params.initial_spread, jnp.float32)
        levels = self._levels
        return MarginalState(
            mean=mean[self._continuous],
            deviation=jnp.full(len(self._continuous), spread),
            table=levels.bounded(levels.table(mean, spread), self._least),
        )

    @functools.partial(jax.jit, static_argnames="self")
    def ask(
        self, key: jax.Array, state: MarginalState, params: Params
    ) -> tuple[jax.Array, MarginalState]:
        """Draws candidates; continuous coordinates are clipped to [0, 1].

        Args:
          key: one key.
          state: the distribution.
          params: not used.

        Returns:
          float32 [population, size] and the state.
        """
        for_numbers, for_levels = jax.random.split(key)
        size = self.population_size
        z = jax.random.normal(for_numbers, (size, len(self._continuous)))
        drawn = jnp.clip(state.mean[None] + state.deviation[None] * z, 0, 1)
        population = jnp.zeros((size, self.space.size)).at[:, self._continuous].set(drawn)
        if len(self._levels.counts):
            drawn = self._levels.sample(for_levels, state.table, size)
            population = population.at[:, self._levels.coordinates].set(drawn)
        return population, state

    @functools.partial(jax.jit, static_argnames="self")
    def tell(
        self,
        key: jax.Array,
        population: jax.Array,
        fitness: jax.Array,
        state: MarginalState,
        params: Params,
    ) -> tuple[MarginalState, dict[str, jax.Array]]:
        """Updates the distribution.

        Args:
          key: not used.
          population: float32 [population, size].
          fitness: float32 [population], finite; less is better.
          state: the distribution that the candidates were drawn from.
          params: what may be set.

        Returns:
          The state, and the mean standard deviation ("step_size") and the mean entropy in nats ("entropy"), of what the
          space has.
        """
        weights = by_rank(elite(self.population_size), fitness)
        counted = weights / jnp.sum(weights**2)
        here = jax.vmap(self.space.active)(population) * counted[:, None]
        metrics: dict[str, jax.Array] = {}
        if len(self._continuous):
            state = self._moved(state, population[:, self._continuous], here, params)
            metrics["step_size"] = jnp.mean(state.deviation)
        if len(self._levels.counts):
            here = here[:, self._levels.starts]
            levels = self._levels.read(population)
            seen = jnp.sum(here[:, :, None] * levels, axis=0)
            total = jnp.sum(here, axis=0)[:, None]
            inertia = jnp.asarray(params.inertia, jnp.float32)
            table = (inertia * state.table + seen) / (inertia + total)
            table = jnp.where(total > 0, self._levels.bounded(table, self._least), state.table)
            state = state._replace(table=table)
            entropy = -jnp.sum(jax.scipy.special.xlogy(table, table), axis=1)
            metrics["entropy"] = jnp.mean(entropy)
        return state, metrics

    def _moved(
        self, state: MarginalState, values: jax.Array, here: jax.Array, params: Params
    ) -> MarginalState:
        here = here[:, self._continuous]
        away = jnp.where(here > 0, values - state.mean[None], 0)
        total = jnp.sum(here, axis=0)
        known = params.inertia + total
        mean = state.mean + jnp.sum(here * away, axis=0) / known
        variance = (params.inertia * state.deviation**2 + jnp.sum(here * away**2, axis=0)) / known
        deviation = jnp.clip(jnp.sqrt(variance), NARROWEST, WIDEST)
        return state._replace(
            mean=jnp.where(total > 0, mean, state.mean),
            deviation=jnp.where(total > 0, deviation, state.deviation),
        )

    @functools.cached_property
    def _levels(self) -> Levels:
        return Levels.of(self.space, ("binary", "categorical", "integer"))

    @functools.cached_property
    def _least(self) -> np.ndarray:
        counts = self._levels.counts
        return 1 / max(len(counts), 2) / np.maximum(counts - 1, 1) * (counts > 1)

    @functools.cached_property
    def _continuous(self) -> np.ndarray:
        columns = self.space.columns
        return np.array([c.start for c in columns if c.kind == "continuous"], np.int32)
