"""Crossover and mutation: bounded, centred, and of the densities that the papers give."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.search.pareto.variation import polynomial_mutation, simulated_binary_crossover


def test_children_stand_around_their_parents() -> None:
    first, second = jnp.full((20_000, 1), 0.4), jnp.full((20_000, 1), 0.6)
    one, other = simulated_binary_crossover(jax.random.key(0), first, second, 2.0)
    np.testing.assert_allclose((one + other) / 2, 0.5, atol=1e-5)
    spread = np.abs(np.asarray(one - other)) / 0.2
    # The density of beta is symmetric about 1 in beta and 1 / beta, the bounds aside.
    assert abs(np.mean(spread < 1) - 0.5) < 0.02
    assert abs(np.quantile(spread[spread < 1], 0.5) - 0.5 ** (1 / 3)) < 0.02


def test_children_and_mutants_stay_in_the_unit_cube() -> None:
    a, b = jax.random.uniform(jax.random.key(0), (2, 1000, 3))
    a, b = a.at[:9].set(0), b.at[:9].set(1)
    one, other = simulated_binary_crossover(jax.random.key(1), a, b, 0.5)
    moved = polynomial_mutation(jax.random.key(2), a, 0.5)
    for values in (one, other, moved):
        assert ((values >= 0) & (values <= 1)).all()
    near = jnp.abs(one - a) < jnp.abs(one - b)
    assert 0.4 < float(jnp.mean(near)) < 0.6


def test_equal_parents_have_equal_children() -> None:
    a = jax.random.uniform(jax.random.key(0), (50, 3))
    one, other = simulated_binary_crossover(jax.random.key(1), a, a, 15.0)
    np.testing.assert_allclose(one, a, atol=1e-6)
    np.testing.assert_allclose(other, a, atol=1e-6)


def test_mutations_are_symmetric_in_the_middle_and_seldom_far() -> None:
    middle = jnp.full((20_000, 1), 0.5)
    moves = np.asarray(polynomial_mutation(jax.random.key(0), middle, 20.0) - middle)
    assert abs(np.mean(moves)) < 2e-3
    # From the bounded form: the median move down from u = 1/4.
    expected = 1 - (0.5 + 0.5 * 0.5**21) ** (1 / 21)
    assert abs(np.median(np.abs(moves)) - expected) < 2e-3
