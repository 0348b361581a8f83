"""Recombination weights go by rank alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmerge.search.strategies.ranking import by_rank, elite, logarithmic


def test_the_better_half_counts_and_the_best_most() -> None:
    weights = elite(9)
    assert weights.sum() == pytest.approx(1)
    assert (np.diff(weights) <= 0).all()
    assert (weights > 0).sum() == 4
    np.testing.assert_allclose(logarithmic(2), [np.log(1.5), np.log(0.75)])


@given(st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_candidates_of_equal_fitness_share_their_weights(values: list[int]) -> None:
    fitness = np.array(values, np.float32)
    given_ = np.asarray(by_rank(logarithmic(7), jnp.asarray(fitness)))
    ranked = logarithmic(7)
    for value in set(values):
        below, same = (fitness < value).sum(), (fitness == value).sum()
        expected = ranked[below : below + same].mean()
        np.testing.assert_allclose(given_[fitness == value], expected, rtol=1e-5, atol=1e-6)


def test_several_rows_of_weights_go_by_the_same_ranks() -> None:
    fitness = jax.random.normal(jax.random.key(0), (6,))
    rows = np.stack([logarithmic(6), elite(6)])
    both = by_rank(rows, fitness)
    for row, weights in zip(both, rows, strict=True):
        np.testing.assert_array_equal(row, by_rank(weights, fitness))
