"""What all mixed-variable strategies owe: conditions, invariances, valid distributions, one program."""

from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmerge.search import binary, categorical, continuous, integer, space, when
from jaxmerge.search.strategies import gaussian as gaussians
from jaxmerge.search.strategies.catcma import CatCMA, CatState
from jaxmerge.search.strategies.margin import MarginCMAES
from jaxmerge.search.strategies.umda import UMDA, MarginalState

MIXED = space(
    {
        "method": categorical(["linear", "ties", "dare"]),
        "density": continuous(0.1, 1.0, when=when("method", "ties")),
        "rank": integer(1, 6, when=when("method", "dare")),
        "on": binary(shape=(3,)),
        "scale": continuous(0, 2, shape=(3,), when=when("on")),
        "inner": categorical(["a", "b"], when=when("on", index=2)),
        "free": continuous(-1, 1, shape=(2,)),
    }
)
P = 10
STRATEGIES = {"margin": MarginCMAES(P, MIXED), "catcma": CatCMA(P, MIXED), "umda": UMDA(P, MIXED)}


@pytest.fixture(params=STRATEGIES, scope="module")
def es(request: pytest.FixtureRequest) -> Any:
    return STRATEGIES[request.param]


def begun(es: Any, generations: int = 3) -> tuple[Any, jax.Array]:
    """A state after some generations, and the next population."""
    state = es.init(jax.random.key(0), MIXED.initial_genome(), es.default_params)
    for i in range(generations):
        population, state = es.ask(jax.random.key(i), state, es.default_params)
        fitness = jax.random.normal(jax.random.key(50 + i), (P,))
        state, _ = es.tell(jax.random.key(0), population, fitness, state, es.default_params)
    return state, es.ask(jax.random.key(9), state, es.default_params)[0]


def assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def told(es: Any, population: jax.Array, fitness: jax.Array, state: Any) -> Any:
    return es.tell(jax.random.key(0), population, fitness, state, es.default_params)[0]


def test_inactive_coordinates_do_not_move_the_state(es: Any) -> None:
    state, population = begun(es)
    active = jax.vmap(MIXED.active)(population)
    assert 0.1 < float(jnp.mean(active)) < 0.9
    noise = jax.random.uniform(jax.random.key(3), population.shape, minval=-5, maxval=5)
    noise = noise.at[0].set(jnp.nan).at[1].set(jnp.inf)
    changed = jnp.where(active, population, noise)
    fitness = jax.random.normal(jax.random.key(4), (P,))
    assert_equal(told(es, population, fitness, state), told(es, changed, fitness, state))


def test_the_fitness_counts_by_rank_alone(es: Any) -> None:
    state, population = begun(es)
    fitness = jnp.round(jax.random.normal(jax.random.key(4), (P,)) * 4) / 4
    assert_equal(
        told(es, population, fitness, state), told(es, population, jnp.exp(3 * fitness) - 5, state)
    )


def test_the_order_of_the_candidates_does_not_matter(es: Any) -> None:
    state, population = begun(es)
    fitness = jnp.round(jax.random.normal(jax.random.key(4), (P,)))
    order = jax.random.permutation(jax.random.key(5), P)
    one = told(es, population, fitness, state)
    other = told(es, population[order], fitness[order], state)
    if hasattr(one, "gaussian"):
        # Eigenvectors have no sign.
        one, other = (s._replace(gaussian=s.gaussian._replace(vectors=0)) for s in (one, other))
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)


def marginals(state: Any) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of the variable `density`, and of `rank` where it is a number."""
    if isinstance(state, MarginalState):
        return np.asarray(state.mean)[:1], np.asarray(state.deviation)[:1]
    kinds = ("continuous", "integer") if isinstance(state, CatState) else None
    numbers = [c for c in MIXED.columns if kinds is None or c.kind in kinds]
    places = np.cumsum([0, *(c.width for c in numbers)])
    chosen = [at for c, at in zip(numbers, places, strict=False) if c.path in ("density", "rank")]
    width = gaussians.deviation(state.gaussian, state.margin)
    return np.asarray(state.gaussian.mean)[chosen], np.asarray(width)[chosen]


def test_variables_that_nobody_had_active_keep_their_distribution(es: Any) -> None:
    state, population = begun(es)
    method = next(c.start for c in MIXED.columns if c.path == "method")
    population = population.at[:, method].set(9.0)
    assert not np.any(jax.vmap(MIXED.decode)(population)["method"])
    after = told(es, population, jax.random.normal(jax.random.key(4), (P,)), state)
    for before, now in zip(marginals(state), marginals(after), strict=True):
        np.testing.assert_allclose(now, before, rtol=1e-5)
    assert not np.array_equal(jax.tree.leaves(after)[0], jax.tree.leaves(state)[0])


@settings(max_examples=25)
@given(st.integers(0, 2**31 - 1), st.integers(0, 4))
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_distribution_stays_valid(name: str, seed: int, values: int) -> None:
    es = STRATEGIES[name]
    params = es.default_params
    state = es.init(jax.random.key(seed), MIXED.initial_genome(), params)
    rng = np.random.default_rng(seed)
    for i in range(6):
        population, state = es.ask(jax.random.key(seed + i), state, params)
        assert np.isfinite(population).all()
        free = np.asarray(population)[:, -2:]
        assert ((free >= 0) & (free <= 1)).all()
        # values == 0: all candidates are equal.
        fitness = rng.integers(0, values + 1, P).astype(np.float32) * 1e30
        state = told(es, population, jnp.asarray(fitness), state)
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(leaf).all()
    if hasattr(state, "table"):
        np.testing.assert_allclose(np.sum(state.table, axis=1), 1, rtol=1e-5)
        assert (np.asarray(state.table) >= 0).all()


def run(es: Any, key: jax.Array, params: Any, generations: int = 60) -> tuple[Any, jax.Array]:
    def generation(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        population, state = es.ask(key, state, params)
        points = jax.vmap(MIXED.decode)(population)
        fitness = (
            jnp.sum((points["free"] - 0.3) ** 2, axis=1)
            + jnp.sum(jnp.where(points["on"], (points["scale"] - 1.5) ** 2, 1), axis=1)
            + jnp.where(points["method"] == 1, (points["density"] - 0.3) ** 2, 1)
        )
        state, metrics = es.tell(key, population, fitness, state, params)
        chex.assert_rank(list(metrics.values()), 0)
        return state, jnp.min(fitness)

    state = es.init(key, MIXED.initial_genome(), params)
    return jax.lax.scan(generation, state, jax.random.split(key, generations))


def test_one_trace_serves_a_run_whatever_the_key_and_the_parameters(es: Any) -> None:
    search = jax.jit(chex.assert_max_traces(lambda key, params: run(es, key, params), 1))
    best = [
        float(
            jnp.min(search(jax.random.key(seed), es.default_params._replace(initial_spread=s))[1])
        )
        for seed, s in [(0, 0.2), (1, 0.3), (2, 0.25)]
    ]
    assert np.median(best) < 0.05


def test_strategies_compare_by_value(es: Any) -> None:
    again = type(es)(P, MIXED)
    assert again == es
    assert hash(again) == hash(es)
    assert type(es)(P + 2, MIXED) != es


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_whole_run_lowers_for_accelerators(es: Any, platform: str) -> None:
    key = jax.random.key(0)
    exported = jax.export.export(
        jax.jit(lambda key: run(es, key, es.default_params)), platforms=[platform]
    )(key)
    assert "python_cpu" not in exported.mlir_module()
