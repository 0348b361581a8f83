"""CatCMA: a Gaussian for numbers and tables of probabilities for choices, moved together."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.search.strategies import gaussian as gaussians
from jaxmerge.search.strategies.gaussian import Gaussian
from jaxmerge.search.strategies.levels import Levels
from jaxmerge.search.strategies.margin import corrected
from jaxmerge.search.strategies.ranking import by_rank, elite

if TYPE_CHECKING:
    from jaxmerge.search.space import Space

_SIGNAL = 1.5
"""alpha of the learning rate's adaptation: the signal-to-noise ratio that it holds."""


class Params(NamedTuple):
    """What may be set, traced.

    Attributes:
      initial_spread: the first standard deviation of the coordinates of numbers; the range of each is [0, 1].
      margin: alpha of integer variables, as in `margin`.
    """

    initial_spread: jax.typing.ArrayLike = 0.25
    margin: jax.typing.ArrayLike = 0.01


class CatState(NamedTuple):
    """The joint distribution.

    Attributes:
      gaussian: of the continuous and the integer variables.
      margin: float32 [numbers], the diagonal of A.
      table: float32 [choices, most levels], the probabilities of the binary and categorical variables.
      signal: s, float32 [choices, most levels]: the sum of past natural gradients, which forgets.
      gain: gamma, float32 []: the squared length that s would have if all gradients had been noise.
      caution: Delta, float32 []: the learning rate is 1 / Delta.
    """

    gaussian: Gaussian
    margin: jax.Array
    table: jax.Array
    signal: jax.Array
    gain: jax.Array
    caution: jax.Array


@dataclass(frozen=True)
class CatCMA:
    r"""Searches continuous, integer, binary and categorical variables together, conditions respected.

    The probabilities q of the choices follow the natural gradient with an adapted length,

    .. math:: G_i = \sum_k w_k a_{ki} (c_{ki} - q_i), \quad q \leftarrow q + \delta G / \|G\|_F, \quad
       \|G\|_F^2 = \sum G^2 / q

    with w the weights by rank (the worse half 0), c the choices as ones among zeros, and a = 1 where the variable was
    active: what was not leaves its probabilities alone. The step delta = 1 / Delta grows while successive gradients
    agree (ASNG). No probability falls below (1 - 0.73^{1/n}) / (levels - 1), n being the number of such variables. The
    Gaussian is that of `MarginCMAES`, inactive coordinates and the margin of integers included (see `gaussian`).

    Two things differ from the paper. The gradients that ASNG sums up are :math:`G / \sqrt q` over all levels, of the
    same length as the paper's over all levels but the last, so that the order of the choices does not matter. And
    candidates of negative weight shape C, as in CMA-ES.

    Attributes:
      population_size: at least 4.
      space: the space.

    Raises:
      ValueError: a population of fewer than 4.

    Reference:
      Hamano, Saito, Nomura, Uchida and Shirakawa, CatCMA: stochastic optimization for mixed-category problems, GECCO
      2024, arXiv:2405.09962; with integers: arXiv:2504.07884 (whose own handling of integers is not used). Akimoto et
      al., Adaptive stochastic natural gradient method for one-shot neural architecture search, ICML 2019.
    """

    population_size: int
    space: Space

    multiobjective: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.population_size < 4:
            raise ValueError(
                f"CatCMA needs a population of at least 4, found {self.population_size}"
            )

    @property
    def default_params(self) -> Params:
        """The margin of integers is 1 / (scalar variables * population)."""
        return Params(margin=1 / (len(self.space.columns) * self.population_size))

    @functools.partial(jax.jit, static_argnames="self")
    def init(self, key: jax.Array, mean: jax.Array, params: Params) -> CatState:
        """The distribution around a genome.

        Args:
          key: not used.
          mean: float32 [size]; its coordinates are the probabilities of binary variables and in proportion to those of
            categorical ones.
          params: what may be set.
        """
        levels = self._levels
        spread = jnp.asarray(params.initial_spread, jnp.float32)
        table = levels.bounded(levels.table(mean, spread), self._least)
        state = CatState(
            gaussian=gaussians.initial(mean[self._numbers], spread),
            margin=jnp.ones(len(self._numbers)),
            table=table,
            signal=jnp.zeros_like(table),
            gain=jnp.zeros(()),
            caution=jnp.ones(()),
        )
        return self._corrected(state, params)

    @functools.partial(jax.jit, static_argnames="self")
    def ask(self, key: jax.Array, state: CatState, params: Params) -> tuple[jax.Array, CatState]:
        """Draws candidates; continuous coordinates are clipped to [0, 1].

        Args:
          key: one key.
          state: the distribution.
          params: not used.

        Returns:
          float32 [population, size] and the state.
        """
        for_numbers, for_choices = jax.random.split(key)
        size = self.population_size
        population = jnp.zeros((size, self.space.size))
        if len(self._numbers):
            drawn = gaussians.sample(for_numbers, state.gaussian, state.margin, size)
            drawn = jnp.where((self._cells == 0)[None], jnp.clip(drawn, 0, 1), drawn)
            population = population.at[:, self._numbers].set(drawn)
        if len(self._levels.counts):
            drawn = self._levels.sample(for_choices, state.table, size)
            population = population.at[:, self._levels.coordinates].set(drawn)
        return population, state

    @functools.partial(jax.jit, static_argnames="self")
    def tell(
        self,
        key: jax.Array,
        population: jax.Array,
        fitness: jax.Array,
        state: CatState,
        params: Params,
    ) -> tuple[CatState, dict[str, jax.Array]]:
        """Updates the distribution.

        Args:
          key: not used.
          population: float32 [population, size].
          fitness: float32 [population], finite; less is better.
          state: the distribution that the candidates were drawn from.
          params: what may be set.

        Returns:
          The state, and the step size ("step_size"), the condition number of C ("condition"), the mean entropy of the
          choices in nats ("entropy") and their learning rate ("rate"); of what the space has.
        """
        active = jax.vmap(self.space.active)(population)
        metrics: dict[str, jax.Array] = {}
        if len(self._numbers):
            constants = gaussians.rates(len(self._numbers), self.population_size)
            positive = np.maximum(constants.weights, 0)
            updated = gaussians.update(
                state.gaussian,
                population[:, self._numbers],
                active[:, self._numbers],
                by_rank(np.stack([positive, constants.weights]), fitness),
                state.margin,
                constants,
            )
            state = self._corrected(state._replace(gaussian=updated), params)
            metrics |= gaussians.metrics(updated)
        if len(self._levels.counts):
            weights = by_rank(elite(self.population_size), fitness)
            here = active[:, self._levels.starts] * weights[:, None]
            state = self._learned(state, self._levels.read(population), here)
            entropy = -jnp.sum(jax.scipy.special.xlogy(state.table, state.table), axis=1)
            metrics |= {"entropy": jnp.mean(entropy), "rate": 1 / state.caution}
        return state, metrics

    def _learned(self, state: CatState, chosen: jax.Array, weights: jax.Array) -> CatState:
        """The step of the probabilities; weights [population, choices]: 0 where not active."""
        q = state.table
        gradient = jnp.sum(weights[:, :, None] * (chosen - q[None]), axis=0)
        white = jnp.where(self._levels.exists, gradient * jax.lax.rsqrt(jnp.maximum(q, 1e-30)), 0)
        length = jnp.sqrt(jnp.sum(white**2))
        moved = length > 0
        unit = jnp.maximum(length, 1e-30)
        rate = 1 / state.caution
        table = self._levels.bounded(q + rate / unit * gradient, self._least)

        parameters = max(self._levels.free, 1)
        beta = rate / np.sqrt(parameters)
        signal = (1 - beta) * state.signal + jnp.sqrt(beta * (2 - beta)) * white / unit
        gain = (1 - beta) ** 2 * state.gain + beta * (2 - beta)
        agreement = gain - jnp.sum(signal**2) / _SIGNAL
        # The learning rate never exceeds sqrt(parameters), where beta reaches 1.
        caution = jnp.clip(state.caution * jnp.exp(beta * agreement), 1 / np.sqrt(parameters), 1e6)
        learned = (table, signal, gain, caution)
        before = (state.table, state.signal, state.gain, state.caution)
        table, signal, gain, caution = (
            jnp.where(moved, new, old) for new, old in zip(learned, before, strict=True)
        )
        return state._replace(table=table, signal=signal, gain=gain, caution=caution)

    def _corrected(self, state: CatState, params: Params) -> CatState:
        width = gaussians.deviation(state.gaussian, state.margin)
        mean, wider = corrected(state.gaussian.mean, width, self._cells, params.margin)
        return state._replace(
            gaussian=state.gaussian._replace(mean=mean), margin=state.margin * wider
        )

    @functools.cached_property
    def _levels(self) -> Levels:
        return Levels.of(self.space, ("binary", "categorical"))

    @functools.cached_property
    def _least(self) -> np.ndarray:
        counts = self._levels.counts
        return (1 - 0.73 ** (1 / max(len(counts), 1))) / np.maximum(counts - 1, 1) * (counts > 1)

    @functools.cached_property
    def _numbers(self) -> np.ndarray:
        """The coordinates of continuous and integer variables."""
        kinds = ("continuous", "integer")
        return np.array([c.start for c in self.space.columns if c.kind in kinds], np.int32)

    @functools.cached_property
    def _cells(self) -> np.ndarray:
        """How many values an integer variable has; 0 for a continuous one."""
        chosen = [column.kind in ("continuous", "integer") for column in self.space.columns]
        return self.space.levels[np.array(chosen)]
