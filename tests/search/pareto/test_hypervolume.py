"""Hypervolume beside inclusion and exclusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import evolution

from jaxmerge.search.pareto import hypervolume

measure = jax.jit(hypervolume)


@settings(max_examples=40)
@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 2, 3, 4]), st.sampled_from([4, 1000]))
def test_is_the_measure_of_the_union(seed: int, k: int, values: int) -> None:
    rng = np.random.default_rng(seed)
    some = (rng.integers(0, values, (7, k)) / values * 1.2).astype(np.float32)
    reference = np.full(k, 1.0, np.float32)
    expected = evolution.hypervolume(some.astype(np.float64), reference.astype(np.float64))
    assert float(measure(some, reference)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_what_is_dominated_or_beyond_adds_nothing() -> None:
    some = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    reference = jnp.array([2.0, 2.0])
    more = jnp.array([[1.0, 1.0], [-5.0, 3.0], [jnp.nan, 0.0], [jnp.inf, 0.0]])
    assert float(measure(some, reference)) == 3
    assert float(measure(jnp.concatenate([some, more]), reference)) == 3
    assert float(measure(more[1:], reference)) == 0


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found \[3, 2\] and \[3\]"):
        hypervolume(jnp.zeros((3, 2)), jnp.zeros(3))
