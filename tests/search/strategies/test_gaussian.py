"""The Gaussian of CMA-ES beside the tutorial in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import evolution

from jaxmerge.search.strategies import gaussian as gaussians
from jaxmerge.search.strategies.gaussian import Gaussian
from jaxmerge.search.strategies.ranking import by_rank

N, POPULATION = 4, 7
CONSTANTS = gaussians.rates(N, POPULATION)
WEIGHTS = np.stack([np.maximum(CONSTANTS.weights, 0), CONSTANTS.weights])


@jax.jit
def update(
    state: Gaussian, values: jax.Array, active: jax.Array, fitness: jax.Array, margin: jax.Array
) -> Gaussian:
    weights = by_rank(WEIGHTS, fitness)
    return gaussians.update(state, values, active, weights, margin, CONSTANTS)


def some(seed: int) -> tuple[Gaussian, jax.Array]:
    """A state in the middle of a run, and the diagonal of a margin."""
    rng = np.random.default_rng(seed)
    root = np.eye(N) + 0.3 * rng.standard_normal((N, N))
    covariance = root @ root.T
    values, vectors = np.linalg.eigh(covariance)
    state = Gaussian(
        mean=rng.uniform(0.2, 0.8, N),
        spread=np.float32(0.2),
        covariance=covariance,
        vectors=vectors,
        roots=np.sqrt(values),
        path=rng.standard_normal(N),
        step_path=rng.standard_normal(N),
        held=rng.uniform(0.5, 2, N),
        generation=np.int32(3),
    )
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), jax.tree.map(_single, state))
    return state, jnp.asarray(rng.uniform(0.5, 2, N), jnp.float32)


def _single(leaf: np.ndarray) -> np.ndarray:
    return leaf if leaf.dtype == np.int32 else np.asarray(leaf, np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("masked", [False, True])
def test_an_update_is_that_of_the_formulas(seed: int, masked: bool) -> None:
    state, margin = some(seed)
    rng = np.random.default_rng(100 + seed)
    values = np.asarray(gaussians.sample(jax.random.key(seed), state, margin, POPULATION))
    active = rng.random((POPULATION, N)) < 0.5 if masked else np.ones((POPULATION, N), bool)
    if masked:
        active[:, 0] = False
    fitness = rng.standard_normal(POPULATION).astype(np.float32)
    found = update(state, values, active, fitness, margin)._asdict()
    expected = evolution.cma_update(state._asdict(), values, active, fitness, np.asarray(margin))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=3e-4, atol=3e-5, err_msg=name)
    roots = np.sqrt(np.linalg.eigvalsh(np.asarray(found["covariance"], np.float64)))
    np.testing.assert_allclose(np.sort(found["roots"]), roots, rtol=1e-4)


def test_constants_are_those_of_the_tutorial() -> None:
    for n, population in [(1, 4), (3, 7), (40, 15), (10, 200)]:
        ours, theirs = gaussians.rates(n, population), evolution.cma_weights(population, n)
        np.testing.assert_allclose(ours.weights, theirs["w"], atol=1e-12)
        assert ours[1:6] == pytest.approx([theirs[k] for k in ("cs", "ds", "cc", "c1", "cmu")])
    assert gaussians.rates(2000, 16).period > 1


def test_a_coordinate_that_nobody_had_active_keeps_its_distribution() -> None:
    state, margin = some(0)
    values = gaussians.sample(jax.random.key(5), state, margin, POPULATION)
    active = np.ones((POPULATION, N), bool)
    active[:, 2] = False
    found = update(state, values, active, np.arange(POPULATION, dtype=np.float32), margin)
    assert found.mean[2] == state.mean[2]
    assert found.path[2] == state.path[2]
    assert found.step_path[2] == state.step_path[2]
    assert found.spread != state.spread
    before, after = (gaussians.deviation(one, margin)[2] for one in (state, found))
    np.testing.assert_allclose(after, before, rtol=1e-6)


def test_where_nothing_is_active_nothing_moves() -> None:
    state, margin = some(1)
    values = gaussians.sample(jax.random.key(5), state, margin, POPULATION)
    nothing = np.zeros((POPULATION, N), bool)
    found = update(state, values, nothing, np.arange(POPULATION, dtype=np.float32), margin)
    for name in ("mean", "spread", "path", "step_path", "held"):
        np.testing.assert_array_equal(getattr(found, name), getattr(state, name))
    np.testing.assert_allclose(found.covariance, state.covariance, rtol=1e-6)


@settings(max_examples=60)
@given(st.integers(0, 2**31 - 1), st.floats(0, 1))
def test_the_covariance_stays_positive_whatever_is_active(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    state, margin = some(seed % 5)
    # As far from the model as can be: every candidate along one direction, far out.
    values = rng.standard_normal(N) * rng.uniform(-50, 50, (POPULATION, 1))
    active = rng.random((POPULATION, N)) < share
    fitness = rng.integers(0, 3, POPULATION).astype(np.float32)
    found = update(state, values.astype(np.float32), active, fitness, margin)
    for leaf in jax.tree.leaves(found):
        assert np.isfinite(leaf).all()
    eigenvalues = np.linalg.eigvalsh(np.asarray(found.covariance, np.float64))
    assert eigenvalues[0] > -1e-6 * eigenvalues[-1]
    assert (np.asarray(found.roots) > 0).all()
    assert (
        gaussians.NARROWEST * 0.999
        <= float(found.spread * jnp.sqrt(jnp.max(jnp.diagonal(found.covariance))))
        <= gaussians.WIDEST * 1.001
    )


def test_eigenvectors_are_computed_every_so_often() -> None:
    state, margin = some(2)
    values = gaussians.sample(jax.random.key(1), state, margin, POPULATION)
    active = jnp.ones((POPULATION, N), bool)
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    lazy = CONSTANTS._replace(period=2)
    step = jax.jit(lambda one: gaussians.update(one, values, active, weights, margin, lazy))
    # The state has 3 updates: the next is the fourth, the one after the fifth.
    fourth = step(state)
    assert not np.array_equal(fourth.roots, state.roots)
    fifth = step(fourth)
    np.testing.assert_array_equal(fifth.roots, fourth.roots)
    assert not np.array_equal(fifth.covariance, fourth.covariance)
