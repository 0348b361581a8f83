"""CMA-ES with margin: the correction beside the paper, and what it guarantees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import evolution
from scipy import stats

from jaxmerge.search import binary, categorical, continuous, integer, space
from jaxmerge.search.strategies import gaussian as gaussians
from jaxmerge.search.strategies.margin import MarginCMAES, corrected

LEVELS = np.array([2, 2, 3, 7, 7, 0, 1000])
correct = jax.jit(lambda mean, width, margin: corrected(mean, width, LEVELS, margin))


@settings(max_examples=100)
@given(st.integers(0, 2**31 - 1), st.floats(0.001, 0.2))
def test_the_correction_is_that_of_the_paper(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    mean = rng.uniform(-0.2, 1.2, len(LEVELS)).astype(np.float32)
    width = (10 ** rng.uniform(-2.5, 0, len(LEVELS))).astype(np.float32)
    found, wider = correct(mean, width, alpha)
    expected = evolution.margin_correction(mean, width, LEVELS, float(np.float32(alpha)))
    np.testing.assert_allclose(found, expected[0], atol=2e-4)
    np.testing.assert_allclose(wider * width, expected[1], rtol=5e-3)


@settings(max_examples=100)
@given(st.integers(0, 2**31 - 1), st.floats(0.001, 0.2), st.floats(-6, 0))
def test_no_value_of_a_variable_becomes_improbable(seed: int, alpha: float, size: float) -> None:
    rng = np.random.default_rng(seed)
    mean = rng.uniform(-3, 4, len(LEVELS)).astype(np.float32)
    width = np.full(len(LEVELS), 10**size, np.float32)
    found, wider = (np.asarray(one, np.float64) for one in correct(mean, width, alpha))
    assert np.isfinite(found).all()
    assert (wider >= 1 - 1e-3).all()
    for m, s, count in zip(found, wider * width, LEVELS, strict=True):
        if count:
            cell = np.clip(np.ceil(m * count) - 1, 0, count - 1)
            low, up = cell / count, (cell + 1) / count
            below = stats.norm.cdf((low - m) / s) if cell > 0 else None
            above = stats.norm.sf((up - m) / s) if cell < count - 1 else None
            sides = [side for side in (below, above) if side is not None]
            # A threshold near 1/2 is known to 2^-25, which is 3% of the smallest width here.
            least = alpha if len(sides) == 1 else alpha / 2
            assert min(sides) >= least * 0.7


def test_continuous_coordinates_are_left_alone() -> None:
    mean = jnp.array([0.3, 4.0])
    found, wider = corrected(mean, jnp.full(2, 1e-6), np.zeros(2, int), 0.1)
    assert found is mean
    assert wider.tolist() == [1, 1]


def test_the_state_keeps_the_margin_over_a_run() -> None:
    mixed = space({"on": binary(shape=(3,)), "n": integer(0, 5), "x": continuous(-1, 1)})
    es = MarginCMAES(8, mixed)
    params = es.default_params
    assert float(params.margin) == pytest.approx(1 / (5 * 8))
    state = es.init(jax.random.key(0), mixed.initial_genome(), params)
    for seed in range(60):
        population, state = es.ask(jax.random.key(seed), state, params)
        fitness = jnp.sum(population, axis=1)
        state, _ = es.tell(jax.random.key(0), population, fitness, state, params)
    width = gaussians.deviation(state.gaussian, state.margin)
    on = [c.start for c in mixed.columns if c.kind == "binary"]
    other = stats.norm.sf((0.5 - np.asarray(state.gaussian.mean)[on]) / np.asarray(width)[on])
    assert (other >= 0.9 / 40).all()
    assert (other < 0.2).all()


def test_choices_are_coordinates_without_a_margin() -> None:
    mixed = space({"way": categorical(["a", "b", "c"]), "x": continuous(-1, 1)})
    es = MarginCMAES(6, mixed)
    state = es.init(jax.random.key(0), mixed.initial_genome(), es.default_params)
    population, _ = es.ask(jax.random.key(1), state, es.default_params)
    assert population.shape == (6, 4)
    assert len(set(np.asarray(jax.vmap(mixed.decode)(population)["way"]).tolist())) > 1
    assert not np.array_equal(np.clip(population, 0, 1), population)


def test_small_populations_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4, found 3"):
        MarginCMAES(3, space({"x": continuous(0, 1)}))
