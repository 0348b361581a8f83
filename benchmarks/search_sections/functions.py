"""Known functions of mixed variables, minimised; 0 is the least value of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.search import Space, binary, continuous, integer, space, when

TARGET = 1e-6
"""The value that counts as found."""


@dataclass(frozen=True)
class Function:
    """One function at one dimension.

    Attributes:
      space: what it takes.
      value: from the decoded point to float32 [].
    """

    space: Space
    value: Callable[[Any], jax.Array]

    def of_genomes(self, population: jax.Array) -> jax.Array:
        """float32 [P, size] -> [P]."""
        return jax.vmap(lambda genome: self.value(self.space.decode(genome)))(population)


def integer_sphere(n: int) -> Function:
    """Half continuous in [-3, 3] about 0.7, half integer in [-10, 10] about 4."""
    half = n // 2
    return Function(
        space({"x": continuous(-3, 3, shape=(n - half,)), "z": integer(-10, 10, shape=(half,))}),
        lambda p: jnp.sum((p["x"] - 0.7) ** 2) + jnp.sum((p["z"] - 4.0) ** 2),
    )


def sphere_one_max(n: int) -> Function:
    """Half continuous in [-3, 3] about 0.7; of the bits that are the other half, all must be on."""
    half = n // 2
    return Function(
        space({"x": continuous(-3, 3, shape=(n - half,)), "z": binary(shape=(half,))}),
        lambda p: jnp.sum((p["x"] - 0.7) ** 2) + jnp.sum(1.0 - p["z"]),
    )


def conditional_sphere(n: int) -> Function:
    """Bits that must be on, each with a scale in [-3, 3] that counts where it is on, and must be 0.7."""
    half = n // 2
    return Function(
        space(
            {
                "x": continuous(-3, 3, shape=(half,), initial=-1.0, when=when("z")),
                "z": binary(shape=(half,)),
            }
        ),
        lambda p: jnp.sum(jnp.where(p["z"], (p["x"] - 0.7) ** 2, 1.0)),
    )


FUNCTIONS = {
    "integer sphere": integer_sphere,
    "sphere + one-max": sphere_one_max,
    "one-max of conditional spheres": conditional_sphere,
}
