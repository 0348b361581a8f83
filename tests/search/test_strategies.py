"""Strategies by name: the baselines, and evosax's in our dress."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import qmc

from jaxmerge.search import (
    binary,
    categorical,
    continuous,
    evolve,
    integer,
    space,
    strategy,
    strategy_names,
)

SPHERE = space({"x": continuous(-1.0, 3.0, shape=(3,))})


def sphere(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    return jnp.sum((point["x"] - 1.5) ** 2)


def test_names_are_forgiving_and_objects_are_kept() -> None:
    assert strategy("CMA-es", 8, SPHERE) is strategy("cmaes", 8, SPHERE)
    assert {"random", "sobol", "CMA_ES", "Sep_CMA_ES", "DifferentialEvolution"} <= set(
        strategy_names()
    )


@pytest.mark.parametrize(
    ("name", "population", "message"),
    [
        ("sep_cma_se", 8, "no strategy 'sep_cma_se'; did you mean 'Sep_CMA_ES'"),
        ("pgpe", 7, "PGPE cannot take a population of 7 .* must be even"),
        ("differential_evolution", 3, "population of 3"),
        ("random", 0, "at least 1 candidate"),
    ],
)
def test_what_a_strategy_cannot_take_is_refused(name: str, population: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(name, population, SPHERE)


@pytest.mark.parametrize("name", ["CMA_ES", "DifferentialEvolution", "Open_ES"])
def test_evosax_strategies_get_better_within_the_box(name: str) -> None:
    result = evolve(
        sphere,
        SPHERE,
        strategy=name,
        population=16,
        generations=30,
        key=jax.random.key(0),
        initial={"x": [-1.0, 3.0, 0.0]},
    )
    assert result.fitness < 0.1 * sphere({"x": jnp.array([-1.0, 3.0, 0.0])}, jax.random.key(0))
    assert ((result.genome >= 0) & (result.genome <= 1)).all()
    np.testing.assert_allclose(result.fitness, np.sum((result.best["x"] - 1.5) ** 2), rtol=1e-5)


def test_sobol_points_are_those_of_the_sequence_under_one_shift() -> None:
    made = strategy("sobol", 8, SPHERE)
    state = made.init(jax.random.key(3), SPHERE.initial_genome(), made.default_params)
    first, state = made.ask(jax.random.key(0), state, made.default_params)
    second, _ = made.ask(jax.random.key(1), state, made.default_params)
    found = np.concatenate([first, second])
    known = qmc.Sobol(3, scramble=False).random(16)
    bits = 16
    shifts = {
        tuple(row)
        for row in np.floor(found * 2**bits).astype(int) ^ np.floor(known * 2**bits).astype(int)
    }
    assert len(shifts) == 1
    # 16 points: one in each sixteenth of every coordinate.
    np.testing.assert_array_equal(np.sort(np.floor(found * 16), axis=0)[:, 0], np.arange(16))


@pytest.mark.parametrize("name", ["random", "sobol"])
def test_baselines_cover_the_space_and_keep_probabilities(name: str) -> None:
    made_space = space(
        {
            "on": binary(shape=(2,), probability=0.2),
            "which": categorical(["a", "b", "c", "d"]),
            "n": integer(0, 4),
            "x": continuous(0.0, 1.0),
        }
    )
    made = strategy(name, 4096, made_space)
    state = made.init(jax.random.key(0), made_space.initial_genome(), made.default_params)
    population, _ = made.ask(jax.random.key(1), state, made.default_params)
    point = jax.vmap(made_space.decode)(population)
    np.testing.assert_allclose(np.mean(point["on"], axis=0), 0.2, atol=0.03)
    np.testing.assert_allclose(np.bincount(point["which"]) / 4096, 0.25, atol=0.03)
    np.testing.assert_allclose(np.bincount(point["n"]) / 4096, 0.2, atol=0.03)
    np.testing.assert_allclose(np.quantile(point["x"], [0.25, 0.75]), [0.25, 0.75], atol=0.03)


def test_an_algorithm_of_populations_begins_with_an_evaluated_one() -> None:
    made = strategy("differential_evolution", 8, SPHERE)
    mean = SPHERE.encode({"x": [0.0, 1.0, 2.0]})
    state = made.init(jax.random.key(0), mean, made.default_params)
    first, state = made.ask(jax.random.key(1), state, made.default_params)
    np.testing.assert_allclose(first[0], mean, atol=1e-6)
    fitness = jnp.arange(8.0)
    state, _ = made.tell(jax.random.key(2), first, fitness, state, made.default_params)
    np.testing.assert_array_equal(state["own"].fitness, fitness)
    np.testing.assert_allclose(0.5 + 0.2 * state["own"].population, first, atol=1e-6)
