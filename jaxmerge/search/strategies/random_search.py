"""Random search: the baseline that every strategy has to beat."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.search.space import Space
from jaxmerge.search.variables import Binary


class Params(NamedTuple):
    """Random search has nothing to set; the spread is not used."""

    initial_spread: float = 1.0


@dataclass(frozen=True)
class RandomSearch:
    """Independent points: continuous and integer variables uniform on their scale, categorical ones even.

    Binary variables are on with their initial probability.

    Attributes:
      population_size: points per generation.
      space: what is searched.

    Reference:
      Bergstra and Bengio, Random search for hyper-parameter optimization, JMLR 13, 2012.
    """

    population_size: int
    space: Space

    multiobjective: ClassVar[bool] = False

    @property
    def default_params(self) -> Params:
        """Nothing to set."""
        return Params()

    def init(self, key: jax.Array, mean: jax.Array, params: Any) -> dict[str, jax.Array]:
        """There is no state."""
        return {}

    def ask(self, key: jax.Array, state: Any, params: Any) -> tuple[jax.Array, Any]:
        """Draws a population."""
        shape = (self.population_size, self.space.size)
        return from_uniform(self.space, jax.random.uniform(key, shape)), state

    def tell(
        self, key: jax.Array, population: jax.Array, fitness: jax.Array, state: Any, params: Any
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Learns nothing."""
        return state, {}


def from_uniform(space: Space, uniform: jax.Array) -> jax.Array:
    """Bends uniform coordinates so that binary variables are on with their initial probability.

    Args:
      space: whose coordinates they are.
      uniform: float32 [..., size] in [0, 1).

    Returns:
      Genomes, float32 [..., size].
    """
    off = [
        1 - variable.start().ravel()
        if isinstance(variable, Binary)
        else np.full(variable.count * variable.width, 0.5)
        for _, variable in space.variables
    ]
    threshold = np.concatenate(off).astype(np.float32)
    # u < threshold goes to the lower half, the rest to the upper one.
    tiny = np.float32(1e-12)
    start, below, above = (
        jnp.broadcast_to(jnp.asarray(one), uniform.shape)
        for one in (threshold, np.maximum(threshold, tiny), np.maximum(1 - threshold, tiny))
    )
    bent = jnp.where(uniform < start, 0.5 * uniform / below, 1 - 0.5 * (1 - uniform) / above)
    return jnp.where(start == 0.5, uniform, bent)
