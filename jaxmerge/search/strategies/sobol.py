"""Sobol points: a baseline that covers the space more evenly than random search."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.search.space import Space
from jaxmerge.search.strategies.random_search import from_uniform

# After so many points the sequence starts anew under another shift.
_BITS = 16
_MOST_DIMENSIONS = 21_201


class Params(NamedTuple):
    """Sobol points have nothing to set; the spread is not used."""

    initial_spread: float = 1.0


@dataclass(frozen=True)
class Sobol:
    """Points of a Sobol sequence with a random digital shift, drawn anew for each restart.

    Attributes:
      population_size: points per generation; a power of 2 covers the space most evenly.
      space: what is searched; at most 21,201 coordinates.

    Reference:
      Joe and Kuo, Constructing Sobol sequences with better two-dimensional projections, SIAM J. Sci. Comput. 30, 2008.
    """

    population_size: int
    space: Space

    multiobjective: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.space.size > _MOST_DIMENSIONS:
            raise ValueError(
                f"sobol takes at most {_MOST_DIMENSIONS} coordinates, the space has {self.space.size}"
            )

    @property
    def default_params(self) -> Params:
        """Nothing to set."""
        return Params()

    def init(self, key: jax.Array, mean: jax.Array, params: Any) -> dict[str, jax.Array]:
        """Draws the shift."""
        return {"key": jax.random.key_data(key), "asked": jnp.zeros((), jnp.uint32)}

    def ask(self, key: jax.Array, state: Any, params: Any) -> tuple[jax.Array, Any]:
        """The next points of the sequence."""
        index = state["asked"] + jnp.arange(self.population_size, dtype=jnp.uint32)
        shift_key = jax.random.wrap_key_data(state["key"])

        def point(i: jax.Array) -> jax.Array:
            inside = i & np.uint32(2**_BITS - 1)
            gray = inside ^ (inside >> 1)
            shift = jax.random.bits(
                jax.random.fold_in(shift_key, i >> _BITS), (self.space.size,), jnp.uint32
            )
            for bit, direction in enumerate(_directions(self.space.size)):
                chosen = (gray >> bit) & np.uint32(1)
                shift = shift ^ (jnp.asarray(direction) * chosen)
            return (shift >> 8).astype(jnp.float32) * np.float32(2**-24)

        population = from_uniform(self.space, jax.vmap(point)(index))
        return population, {**state, "asked": state["asked"] + np.uint32(self.population_size)}

    def tell(
        self, key: jax.Array, population: jax.Array, fitness: jax.Array, state: Any, params: Any
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Learns nothing."""
        return state, {}


@functools.cache
def _directions(dimensions: int) -> np.ndarray:
    """Direction numbers, uint32 [bits, dimensions].

    In Gray code order the points number 2^(j + 1) - 1 are the direction numbers themselves.
    """
    from scipy.stats import qmc

    sequence = qmc.Sobol(dimensions, scramble=False, bits=_BITS)
    directions = np.empty((_BITS, dimensions), np.uint32)
    at = 0
    for bit in range(_BITS):
        wanted = 2 ** (bit + 1) - 1
        sequence.fast_forward(wanted - at)
        directions[bit] = (sequence.random(1)[0] * 2**_BITS).astype(np.uint32)
        at = wanted + 1
    return directions << (32 - _BITS)
