"""UMDA beside its formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.search import binary, categorical, continuous, integer, space, when
from jaxmerge.search.strategies.ranking import elite
from jaxmerge.search.strategies.umda import UMDA

MIXED = space(
    {
        "a": categorical(["p", "q", "r"]),
        "b": binary(shape=(2,)),
        "n": integer(0, 3),
        "x": continuous(0, 1, shape=(2,), when=when("b")),
    }
)
P = 12
ES = UMDA(P, MIXED)


def test_an_update_is_that_of_the_formulas() -> None:
    params = ES.default_params._replace(inertia=1.5)
    state = ES.init(jax.random.key(0), MIXED.initial_genome(), params)
    population, state = ES.ask(jax.random.key(1), state, params)
    fitness = jax.random.normal(jax.random.key(2), (P,))
    after, _ = ES.tell(jax.random.key(0), population, fitness, state, params)
    x = np.asarray(population, np.float64)[np.argsort(fitness)]
    w = elite(P)
    w = w / (w**2).sum()
    on = x[:, 3:5] > 0.5
    levels = [
        (x[:, :3].argmax(1), 3),
        (on[:, 0] * 1, 2),
        (on[:, 1] * 1, 2),
        (np.floor(x[:, 5] * 4).astype(int), 4),
    ]
    for i, (chosen, count) in enumerate(levels):
        q = np.asarray(state.table, np.float64)[i, :count]
        q = (1.5 * q + w @ np.eye(count)[chosen]) / (1.5 + w.sum())
        low = 1 / 4 / (count - 1)
        q = np.maximum(q, low)
        q = low + (q - low) * (1 - low * count) / (q - low).sum()
        np.testing.assert_allclose(after.table[i, :count], q, rtol=1e-4)
    for j in range(2):
        here = w * on[:, j]
        mean, deviation = float(state.mean[j]), float(state.deviation[j])
        away = x[:, 6 + j] - mean
        known = 1.5 + here.sum()
        assert float(after.mean[j]) == pytest.approx(mean + (here * away).sum() / known, rel=1e-4)
        variance = (1.5 * deviation**2 + (here * away**2).sum()) / known
        assert float(after.deviation[j]) == pytest.approx(variance**0.5, rel=1e-4)


def test_one_observation_does_not_settle_a_variable() -> None:
    state = ES.init(jax.random.key(0), MIXED.initial_genome(), ES.default_params)
    population = jnp.zeros((P, MIXED.size)).at[0, 3].set(1).at[0, 6].set(0.5)
    fitness = jnp.arange(float(P))
    after, _ = ES.tell(jax.random.key(0), population, fitness, state, ES.default_params)
    assert 0.05 < float(after.deviation[0]) < float(state.deviation[0])


def test_small_populations_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2, found 1"):
        UMDA(1, MIXED)
