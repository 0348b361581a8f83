"""The fitness of many genomes: decoded and evaluated in chunks, spread over a mesh."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.search.job import AXIS, Search, replicated
from jaxmerge.search.space import Space

Objective = Callable[..., Any]


@functools.partial(jax.jit, static_argnums=(0, 1))
def candidate(
    objective: Objective, space: Space, genome: jax.Array, key: jax.Array, args: tuple[Any, ...]
) -> jax.Array:
    """The fitness of one genome, float32 [] or [objectives].

    Compiled by itself so that its trace is kept: the check before a search and the search share it.
    """
    return jnp.asarray(objective(space.decode(genome), key, *args)).astype(jnp.float32)


def evaluate(
    search: Search,
    objective: Objective,
    genomes: jax.Array,
    key: jax.Array,
    args: tuple[Any, ...],
) -> jax.Array:
    """Evaluates all genomes under one key.

    Args:
      search: its chunk and mesh say how many are evaluated at once.
      objective: (hyperparameters, key, *args) -> a number, or [objectives].
      genomes: float32 [candidates, size].
      key: what all candidates see.
      args: what the objective needs.

    Returns:
      float32 [candidates] or [candidates, objectives], whole on every device.
    """

    def one(genome: jax.Array) -> jax.Array:
        return candidate(objective, search.space, genome, key, args)

    count = len(genomes)
    width, rounds = layout(search)
    filled = jnp.concatenate(
        [genomes, jnp.broadcast_to(genomes[:1], (width * rounds - count, genomes.shape[1]))]
    )
    if width == 1 and search.mesh is None:
        # Not a vmap of one: what `lax.cond` leaves out is then left out.
        fitness = jax.lax.map(one, filled)
    elif rounds == 1:
        fitness = jax.vmap(one)(_spread(search, filled, 0))
    else:
        chunks = _spread(search, filled.reshape(rounds, width, -1), 1)
        fitness = jax.lax.map(jax.vmap(one), chunks)
        fitness = fitness.reshape(-1, *fitness.shape[2:])
    return replicated(search.mesh, fitness[:count])


def layout(search: Search) -> tuple[int, int]:
    """How many candidates are evaluated at once on all devices, and how many times; with the least filling."""
    devices = 1 if search.mesh is None else search.mesh.shape[AXIS]
    rounds = math.ceil(search.candidates / (search.chunk * devices))
    width = math.ceil(search.candidates / (rounds * devices)) * devices
    return width, rounds


def _spread(search: Search, genomes: jax.Array, axis: int) -> jax.Array:
    if search.mesh is None:
        return genomes
    spec = jax.P(*[None] * axis, AXIS)
    return jax.lax.with_sharding_constraint(genomes, jax.NamedSharding(search.mesh, spec))
