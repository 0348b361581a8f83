"""CMA-ES with margin: no value of a binary or integer variable ever becomes improbable."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from jaxmerge.search.strategies import gaussian as gaussians
from jaxmerge.search.strategies.gaussian import Gaussian
from jaxmerge.search.strategies.ranking import by_rank

if TYPE_CHECKING:
    from jaxmerge.search.space import Space


class Params(NamedTuple):
    """What may be set, traced.

    Attributes:
      initial_spread: the first standard deviation of every coordinate of the genome; the range of each is [0, 1].
      margin: alpha, in (0, 1/3): the least probability with which an integer variable leaves its value, summed over
        both sides.
    """

    initial_spread: jax.typing.ArrayLike = 0.25
    margin: jax.typing.ArrayLike = 0.01


class MarginState(NamedTuple):
    """The distribution.

    Attributes:
      gaussian: over all coordinates of the genome.
      margin: float32 [size], the diagonal of A.
    """

    gaussian: Gaussian
    margin: jax.Array


@dataclass(frozen=True)
class MarginCMAES:
    """CMA-ES whose Gaussian keeps a least probability for the other values of a binary or integer variable.

    Where all of a Gaussian falls into one value of a variable, CMA-ES goes blind to the others. After each update the
    mean and the widths A of the discrete coordinates are corrected so that this does not happen. Categorical variables
    are as many continuous coordinates as they have choices, without a margin (`CatCMA` knows them better). Variables
    that are not active count for nothing (see `gaussian`).

    Attributes:
      population_size: at least 4.
      space: the space.

    Raises:
      ValueError: a population of fewer than 4.

    Reference:
      Hamano, Saito, Nomura and Shirakawa, CMA-ES with margin: lower-bounding marginal probability for mixed-integer
      black-box optimization, GECCO 2022, arXiv:2205.13482.
    """

    population_size: int
    space: Space

    multiobjective: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.population_size < 4:
            raise ValueError(
                f"CMA-ES with margin needs a population of at least 4, found {self.population_size}"
            )

    @property
    def default_params(self) -> Params:
        """The margin is 1 / (size of the genome * population), as in the paper."""
        return Params(margin=1 / (self.space.size * self.population_size))

    @functools.partial(jax.jit, static_argnames="self")
    def init(self, key: jax.Array, mean: jax.Array, params: Params) -> MarginState:
        """The distribution around a genome.

        Args:
          key: not used.
          mean: float32 [size].
          params: what may be set.
        """
        state = gaussians.initial(mean, jnp.asarray(params.initial_spread, jnp.float32))
        return self._corrected(MarginState(state, jnp.ones(self.space.size)), params)

    @functools.partial(jax.jit, static_argnames="self")
    def ask(
        self, key: jax.Array, state: MarginState, params: Params
    ) -> tuple[jax.Array, MarginState]:
        """Draws candidates; continuous coordinates are clipped to [0, 1].

        Args:
          key: one key.
          state: the distribution.
          params: not used.

        Returns:
          float32 [population, size] and the state.
        """
        drawn = gaussians.sample(key, state.gaussian, state.margin, self.population_size)
        return jnp.where(self._continuous[None], jnp.clip(drawn, 0, 1), drawn), state

    @functools.partial(jax.jit, static_argnames="self")
    def tell(
        self,
        key: jax.Array,
        population: jax.Array,
        fitness: jax.Array,
        state: MarginState,
        params: Params,
    ) -> tuple[MarginState, dict[str, jax.Array]]:
        """Updates the distribution.

        Args:
          key: not used.
          population: float32 [population, size].
          fitness: float32 [population], finite; less is better.
          state: the distribution that the candidates were drawn from.
          params: what may be set.

        Returns:
          The state, and the step size ("step_size") and the condition number of C ("condition").
        """
        constants = gaussians.rates(self.space.size, self.population_size)
        weights = by_rank(np.stack([np.maximum(constants.weights, 0), constants.weights]), fitness)
        active = jax.vmap(self.space.active)(population)
        updated = gaussians.update(
            state.gaussian, population, active, weights, state.margin, constants
        )
        state = self._corrected(MarginState(updated, state.margin), params)
        return state, gaussians.metrics(updated)

    def _corrected(self, state: MarginState, params: Params) -> MarginState:
        width = gaussians.deviation(state.gaussian, state.margin)
        mean, wider = corrected(state.gaussian.mean, width, self._levels, params.margin)
        return MarginState(state.gaussian._replace(mean=mean), state.margin * wider)

    @functools.cached_property
    def _levels(self) -> np.ndarray:
        """How many values a coordinate decides between; 0: any number."""
        levels = np.zeros(self.space.size, np.int32)
        for column, count in zip(self.space.columns, self.space.levels, strict=True):
            if column.kind in ("binary", "integer"):
                levels[column.start] = count
        return levels

    @functools.cached_property
    def _continuous(self) -> np.ndarray:
        continuous = np.zeros(self.space.size, bool)
        for column in self.space.columns:
            continuous[column.start] = column.kind == "continuous"
        return continuous


def corrected(
    mean: jax.Array, width: jax.Array, levels: np.ndarray, margin: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    r"""Bounds from below how probably a discrete coordinate takes another value than its mean's.

    A coordinate decides between L values by L equal cells of [0, 1]. Where the mean lies in the first or last cell, it
    is drawn to the cell's inner threshold until the other side has the probability alpha. In a cell between, both sides
    get at least alpha / 2, what that takes is taken from the larger of the three probabilities in proportion, and mean
    and width follow from the probabilities.

    Args:
      mean: float32 [n].
      width: the standard deviations, float32 [n].
      levels: int [n], static: L, or 0 for a continuous coordinate, which stays as it is.
      margin: alpha, scalar.

    Returns:
      The mean and the factors of the widths, float32 [n] each.
    """
    discrete = levels > 0
    if not discrete.any():
        return mean, jnp.ones_like(mean)
    count = np.where(discrete, levels, 2).astype(np.float32)
    alpha = jnp.asarray(margin, jnp.float32)
    cell = jnp.clip(jnp.ceil(mean * count) - 1, 0, count - 1)
    first, last = cell == 0, cell == count - 1

    threshold = jnp.where(first, 1, count - 1) / count
    away = mean - threshold
    reach = -width * norm.ppf(alpha)
    at_edge = threshold + jnp.sign(away) * jnp.minimum(jnp.abs(away), reach)

    low, high = cell / count, (cell + 1) / count
    below, above = norm.cdf((low - mean) / width), norm.cdf((mean - high) / width)
    within = 1 - below - above
    needed = jnp.minimum(below, above) < alpha / 2
    below, above = jnp.maximum(below, alpha / 2), jnp.maximum(above, alpha / 2)
    total = below + within + above
    given = (1 - total) / (total - 1.5 * alpha)
    below, above = (p + given * (p - alpha / 2) for p in (below, above))
    to_low, to_high = -norm.ppf(jnp.minimum(below, 0.4999)), -norm.ppf(jnp.minimum(above, 0.4999))
    inside = (low * to_high + high * to_low) / (to_low + to_high)
    wider = (high - low) / ((to_low + to_high) * width)

    edge = first | last
    changed = discrete & ~edge & needed
    return (
        jnp.where(discrete & edge, at_edge, jnp.where(changed, inside, mean)),
        jnp.where(changed, wider, 1),
    )
