"""NSGA-II finds and keeps fronts of mixed spaces."""

from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import evolution

from jaxmerge.search import binary, categorical, continuous, integer, space
from jaxmerge.search.pareto import NSGA2, hypervolume

MIXED = space(
    {
        "x": continuous(0, 1),
        "n": integer(0, 9),
        "on": binary(shape=(4,)),
        "way": categorical(["a", "b", "c"]),
    }
)
ES = NSGA2(24, MIXED)


def objectives(point: Any) -> jax.Array:
    """The front: every x, n = 3, all on, way b."""
    distance = jnp.abs(point["n"] - 3) / 3.0 + jnp.mean(1.0 - point["on"]) + (point["way"] != 1)
    return jnp.array([point["x"], 1 - jnp.sqrt(point["x"])]) + distance


@jax.jit
@chex.assert_max_traces(n=1)
def run(key: jax.Array) -> tuple[Any, Any]:
    params = ES.default_params

    def generation(state: Any, key: jax.Array) -> tuple[Any, Any]:
        population, state = ES.ask(key, state, params)
        fitness = jax.vmap(lambda genome: objectives(MIXED.decode(genome)))(population)
        state, metrics = ES.tell(key, population, fitness, state, params)
        return state, (hypervolume(state.fitness, jnp.ones(2)), metrics["front"], population)

    state = ES.init(key, MIXED.initial_genome(), params)
    return jax.lax.scan(generation, state, jax.random.split(key, 60))


def test_the_front_is_found_and_never_lost() -> None:
    state, (covered, front, population) = run(jax.random.key(0))
    assert (np.diff(covered) >= -0.02).all()
    # The front covers 1 - integral of 1 - sqrt(x) = 2/3.
    assert covered[-1] > 0.6
    assert front[-1] == 24
    np.testing.assert_array_equal(
        state.ranks, evolution.nondominated_ranks(np.asarray(state.fitness))
    )
    best = jax.vmap(MIXED.decode)(state.population)
    assert np.mean((best["n"] == 3) & best["on"].all(1) & (best["way"] == 1)) > 0.8
    assert ((population >= 0) & (population <= 1)).all()


def test_another_key_gives_another_run_of_the_same_program() -> None:
    run(jax.random.key(1))
    run(jax.random.key(2))


def test_the_given_genome_is_a_candidate_of_the_first_generation() -> None:
    mean = jnp.linspace(0, 1, MIXED.size)
    state = ES.init(jax.random.key(0), mean, ES.default_params)
    population, _ = ES.ask(jax.random.key(1), state, ES.default_params)
    np.testing.assert_array_equal(population[0], mean)
    assert len(np.unique(population, axis=0)) == 24


def test_the_survivors_are_the_best_fronts_and_the_least_crowded() -> None:
    es = NSGA2(3, space({"x": continuous(0, 1)}))
    state = es.init(jax.random.key(0), jnp.zeros(1), es.default_params)
    first = jnp.array([[0.0, 4.0], [4.0, 0.0], [5.0, 5.0]])
    state, _ = es.tell(jax.random.key(0), jnp.arange(3.0)[:, None], first, state, es.default_params)
    second = jnp.array([[0.5, 3.5], [2.0, 2.0], [3.6, 0.4]])
    genomes = jnp.arange(3.0, 6.0)[:, None]
    state, metrics = es.tell(jax.random.key(0), genomes, second, state, es.default_params)
    assert sorted(state.population[:, 0].tolist()) == [0.0, 1.0, 4.0]
    assert metrics["front"] == 3


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_whole_run_lowers_for_accelerators(platform: str) -> None:
    chex.clear_trace_counter()
    exported = jax.export.export(run, platforms=[platform])(jax.random.key(0))
    assert exported.platforms == (platform,)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2, found 1"):
        NSGA2(1, MIXED)
    with pytest.raises(ValueError, match="at least one objective, found 0"):
        NSGA2(4, MIXED, objectives=0)
