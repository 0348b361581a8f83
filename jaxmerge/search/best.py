"""The best candidates so far: the single best, of noisy objectives the best on average, of several ones the front."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.search.job import Search
from jaxmerge.search.pareto import crowding_distance, nondominated_ranks

Best = dict[str, jax.Array]


def start(search: Search) -> Best:
    """Returns an empty record.

    Args:
      search: of which.

    Returns:
      "genome" float32 [restarts, size] and "fitness" float32 [restarts], infinite so far. Where elites are evaluated
      again, also "elites" [restarts, reevaluate, size], the tried first and the newcomers last, and of their
      evaluations as elites "count" (-1 for an empty slot), "mean" and "squares" (of what differs from the mean).
      Of several objectives "genome" is [population, size] and "fitness" [population, objectives], of all restarts
      together; an empty row is infinite.
    """
    if search.objectives > 1:
        rows = search.strategy.population_size
        return {
            "genome": jnp.zeros((rows, search.space.size)),
            "fitness": jnp.full((rows, search.objectives), jnp.inf),
        }
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
      fitness: float32 [restarts, population + reevaluate], those of the elites last, or [restarts, population,
        objectives]; infinite where it is not finite.
    """
    if search.objectives > 1:
        return _front(best, *(x.reshape(-1, x.shape[-1]) for x in (population, fitness)))
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


def _front(best: Best, population: jax.Array, fitness: jax.Array) -> Best:
    """What none betters; where that is too much, what lies least crowded."""
    size = best["fitness"].shape[0]
    genomes = jnp.concatenate([best["genome"], population])
    points = jnp.concatenate([best["fitness"], fitness])
    whole = jnp.all(jnp.isfinite(points), axis=1)
    points = jnp.where(whole[:, None], points, jnp.inf)
    ranks = nondominated_ranks(points, enough=size)
    crowding = crowding_distance(jnp.where(whole[:, None], points, 0.0), ranks)
    kept = jnp.lexsort((-crowding, ranks))[:size]
    first = (ranks[kept] == 0) & whole[kept]
    return {
        "genome": genomes[kept],
        "fitness": jnp.where(first[:, None], points[kept], jnp.inf),
    }


def finest(search: Search, best: Best) -> tuple[np.ndarray, np.ndarray]:
    """The genome [size] and the fitness [] of the best of all restarts.

    Of several objectives the front: [points, size] and [points, objectives], by the first objective.
    """
    genome, fitness = np.asarray(best["genome"]), np.asarray(best["fitness"])
    if search.objectives > 1:
        order = np.lexsort(fitness.T[::-1])
        order = order[np.isfinite(fitness[order]).all(axis=1)]
        return genome[order], fitness[order]
    i = int(np.argmin(fitness))
    return genome[i], fitness[i]
