"""One generation, and many of them in one program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.search import best
from jaxmerge.search.evaluating import Objective, evaluate
from jaxmerge.search.job import Carry, Search

Record = dict[str, jax.Array]

_LARGEST = np.float32(np.finfo(np.float32).max / 4)


@functools.partial(jax.jit, static_argnums=0)
def start(search: Search, key: jax.Array, genome: jax.Array) -> Carry:
    """Sets out.

    Args:
      search: which.
      key: of the whole search.
      genome: float32 [size], where the first restart begins; the others begin at random points.
    """
    keys = jax.random.split(_key(key, 0, 3), search.restarts)
    means = jnp.broadcast_to(genome, (search.restarts, search.space.size))
    if search.restarts > 1:
        # Coordinates of choices keep their even start: they are probabilities rather than places.
        free = np.concatenate(
            [
                np.full(v.count * v.width, v.kind in ("continuous", "integer"))
                for _, v in search.space.variables
            ]
        )
        drawn = jax.random.uniform(_key(key, 0, 4), means.shape)
        moves = jnp.asarray(free)[None] & (jnp.arange(search.restarts) > 0)[:, None]
        means = jnp.where(moves, drawn, means)
    params = search.strategy.default_params
    state = jax.vmap(search.strategy.init, (0, 0, None))(keys, means, params)
    return Carry(
        state,
        best.start(search),
        jnp.zeros(search.restarts, jnp.int32),
        jnp.full(search.restarts, jnp.inf),
        jnp.zeros((), bool),
        jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run_generations(
    search: Search,
    objective: Objective,
    length: int,
    carry: Carry,
    first: jax.Array,
    generations: jax.Array,
    key: jax.Array,
    args: tuple[Any, ...],
) -> tuple[Carry, Record]:
    """Runs generations in one compiled loop.

    Args:
      search: which.
      objective: see `evaluate`.
      length: of the loop.
      carry: of the generation before.
      first: int32 [], the number of the first generation.
      generations: int32 [], how many the whole search has; beyond that, or when it has stopped, nothing happens.
      key: of the whole search.
      args: of the objective.

    Returns:
      The carry, and what was recorded of each generation: float32 [length] by name, NaN where nothing happened.
    """

    def run(carry: Carry, number: jax.Array) -> tuple[Carry, Record]:
        genomes, state = ask(search, carry, number, key)
        fitness = evaluate(search, objective, genomes, objective_key(key, number), args)
        return tell(search, carry, state, genomes, fitness, number, key)

    def step(carry: Carry, number: jax.Array) -> tuple[Carry, Record]:
        _, record = jax.eval_shape(run, carry, number)
        nothing = jax.tree.map(lambda one: jnp.full(one.shape, jnp.nan, one.dtype), record)
        running = (number < generations) & ~carry.stopped
        return jax.lax.cond(running, run, lambda carry, _: (carry, nothing), carry, number)

    return jax.lax.scan(step, carry, first + jnp.arange(length, dtype=jnp.int32))


def ask(search: Search, carry: Carry, number: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
    """The candidates of a generation, float32 [candidates, size]: each restart's population, then its elites."""
    keys = jax.random.split(_key(key, number, 0), search.restarts)
    params = search.strategy.default_params
    genomes, state = jax.vmap(search.strategy.ask, (0, 0, None))(keys, carry.state, params)
    if search.reevaluate:
        genomes = jnp.concatenate([genomes, carry.best["elites"]], axis=1)
    return genomes.reshape(-1, search.space.size), state


def tell(
    search: Search,
    carry: Carry,
    state: Any,
    genomes: jax.Array,
    fitness: jax.Array,
    number: jax.Array,
    key: jax.Array,
) -> tuple[Carry, Record]:
    """Takes in what `ask` returned and its fitness, [candidates] or [candidates, objectives]."""
    size = search.strategy.population_size
    genomes = genomes.reshape(search.restarts, -1, search.space.size)
    fitness = fitness.reshape(search.restarts, -1, *fitness.shape[1:])
    population = genomes[:, :size]
    finite = jnp.isfinite(fitness)
    keys = jax.random.split(_key(key, number, 1), search.restarts)
    state, metrics = jax.vmap(search.strategy.tell, (0, 0, 0, 0, None))(
        keys, population, guard(fitness)[:, :size], state, search.strategy.default_params
    )
    found = best.update(search, carry.best, population, jnp.where(finite, fitness, jnp.inf))
    stale, progressed = carry.stale, carry.record
    if search.objectives == 1:
        improved = found["fitness"] < carry.record - search.tolerance
        stale = jnp.where(improved, 0, stale + 1)
        progressed = jnp.where(improved, found["fitness"], carry.record)
    carry = Carry(
        state,
        found,
        stale,
        progressed,
        carry.stopped if search.patience is None else jnp.all(stale >= search.patience),
        carry.evaluations + search.candidates,
    )
    lost = jnp.sum(~jnp.all(finite.reshape(*finite.shape[:2], -1), axis=2))
    record = {
        "spread": jnp.mean(jnp.std(jnp.clip(population, 0.0, 1.0), axis=1)),
        "nonfinite": lost,
        "evaluations": carry.evaluations,
    }
    for i in range(search.objectives):
        one, known, top = (
            (x[..., i] if search.objectives > 1 else x) for x in (fitness, finite, found["fitness"])
        )
        suffix = f"_{i}" if search.objectives > 1 else ""
        record |= {
            f"best{suffix}": jnp.min(top),
            f"generation_best{suffix}": jnp.min(jnp.where(known, one, jnp.inf)),
            f"mean{suffix}": jnp.sum(jnp.where(known, one, 0.0)) / jnp.sum(known),
        }
    record |= {name: jnp.mean(value) for name, value in metrics.items()}
    return carry, {name: value.astype(jnp.float32) for name, value in record.items()}


def guard(fitness: jax.Array) -> jax.Array:
    """Replaces what is not finite by a little more than the worst that is.

    Args:
      fitness: float32 [restarts, candidates] or [restarts, candidates, objectives].
    """
    finite = jnp.isfinite(fitness)
    worst = jnp.max(jnp.where(finite, fitness, -jnp.inf), axis=1, keepdims=True)
    # One more than a large number may be the same number; twice its size is not.
    worse = worst + jnp.maximum(1.0, jnp.abs(worst))
    worse = jnp.where(jnp.isfinite(worse), worse, _LARGEST)
    return jnp.where(finite, fitness, jnp.broadcast_to(worse, fitness.shape))


def objective_key(key: jax.Array, number: jax.Array) -> jax.Array:
    """What all candidates of a generation see, in all restarts: common random numbers."""
    return _key(key, number, 2)


def _key(key: jax.Array, number: Any, purpose: int) -> jax.Array:
    """Purposes: 0 ask, 1 tell, 2 objective, 3 and 4 the start."""
    return jax.random.fold_in(jax.random.fold_in(key, purpose), number)
