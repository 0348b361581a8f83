"""The best candidates so far: the single best, or of noisy objectives the best on average."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.search.searching import Search

Best = dict[str, jax.Array]


def start(search: Search) -> Best:
    """Returns an empty record.

    Args:
      search: of which.

    Returns:
      "genome" float32 [restarts, size] and "fitness" float32 [restarts], infinite so far. Where elites are evaluated
      again, also "elites" [restarts, reevaluate, size], the tried first and the newcomers last, and of their
      evaluations as elites "count" (-1 for an empty slot), "mean" and "squares" (of what differs from the mean).
    """
    restarts, size, elites = search.restarts, search.space.size, search.reevaluate
    best = {"genome": jnp.zeros((restarts, size)), "fitness": jnp.full((restarts,), jnp.inf)}
    if not elites:
        return best
    return best | {
        "elites": jnp.broadcast_to(search.space.initial_genome(), (restarts, elites, size)),
        "count": jnp.full((restarts, elites), -1, jnp.int32),
        "mean": jnp.zeros((restarts, elites)),
        "squares": jnp.zeros((restarts, elites)),
    }


def update(search: Search, best: Best, population: jax.Array, fitness: jax.Array) -> Best:
    """Takes a generation in.

    Args:
      search: of which.
      best: so far.
      population: float32 [restarts, population, size].
      fitness: float32 [restarts, population + reevaluate], those of the elites last; infinite where it is not finite.
    """
    size = search.strategy.population_size
    if search.reevaluate:
        return jax.vmap(_average)(best, population, fitness[:, :size], fitness[:, size:])
    return jax.vmap(_smaller)(best, population, fitness)


def _smaller(best: Best, population: jax.Array, fitness: jax.Array) -> Best:
    i = jnp.argmin(fitness)
    better = fitness[i] < best["fitness"]
    return {
        "genome": jnp.where(better, population[i], best["genome"]),
        "fitness": jnp.where(better, fitness[i], best["fitness"]),
    }


def _average(best: Best, population: jax.Array, fitness: jax.Array, again: jax.Array) -> Best:
    """The evaluation that brought a candidate among the elites was lucky: only later ones count.

    Half of the slots are for newcomers. What has been tried is ranked by its mean and two standard errors: a newcomer
    that is lucky again does not overtake what has proved itself.
    """
    newcomers = again.shape[0] // 2
    tried = again.shape[0] - newcomers
    valid = (best["count"] >= 0) & jnp.isfinite(again)
    count = jnp.where(valid, best["count"] + 1, 0)
    change = jnp.where(valid, again - best["mean"], 0.0)
    mean = best["mean"] + change / jnp.maximum(count, 1)
    squares = best["squares"] + jnp.where(valid, change * (again - mean), 0.0)
    freedom = jnp.sum(jnp.where(valid, count - 1, 0))
    variance = jnp.sum(jnp.where(valid, squares, 0.0)) / jnp.maximum(freedom, 1)
    score = jnp.where(valid, mean + 2 * jnp.sqrt(variance / jnp.maximum(count, 1)), jnp.inf)
    kept = jnp.argsort(score)[:tried]
    new = jnp.argsort(fitness)[:newcomers]
    elite = valid[kept[0]]
    start = jnp.zeros(newcomers)
    return {
        "genome": jnp.where(elite, best["elites"][kept[0]], population[new[0]]),
        "fitness": jnp.where(elite, mean[kept[0]], fitness[new[0]]),
        "elites": jnp.concatenate([best["elites"][kept], population[new]]),
        "count": jnp.concatenate(
            [
                jnp.where(valid[kept], count[kept], -1),
                jnp.where(jnp.isfinite(fitness[new]), 0, -1),
            ]
        ),
        "mean": jnp.concatenate([jnp.where(valid[kept], mean[kept], 0.0), start]),
        "squares": jnp.concatenate([jnp.where(valid[kept], squares[kept], 0.0), start]),
    }


def finest(search: Search, best: Best) -> tuple[Any, Any]:
    """The genome [size] and the fitness of the best of all restarts."""
    i = jnp.argmin(best["fitness"])
    return best["genome"][i], best["fitness"][i]
