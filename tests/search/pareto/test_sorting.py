"""Fronts and crowding beside the definitions."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import evolution

from jaxmerge.search.pareto import crowding_distance, nondominated_ranks

ranks_of = jax.jit(nondominated_ranks, static_argnames="enough")
crowding_of = jax.jit(crowding_distance)


def points(seed: int, k: int, values: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, values, (12, k)).astype(np.float32)


@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 2, 3]), st.sampled_from([2, 5, 1000]))
def test_fronts_are_those_of_the_definition(seed: int, k: int, values: int) -> None:
    some = points(seed, k, values)
    np.testing.assert_array_equal(ranks_of(some), evolution.nondominated_ranks(some))


@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 2, 3]), st.sampled_from([5, 1000]))
def test_crowding_is_that_of_the_definition(seed: int, k: int, values: int) -> None:
    some = points(seed, k, values)
    ranks = evolution.nondominated_ranks(some)
    found = crowding_of(some, jnp.asarray(ranks, jnp.int32))
    # Equal values may stand in either order: only what is unique is compared.
    unique = [
        len(np.unique(some[ranks == r, j])) == (ranks == r).sum() for r in ranks for j in range(k)
    ]
    if all(unique):
        np.testing.assert_allclose(found, evolution.crowding_distance(some, ranks), rtol=1e-5)
    assert not np.isnan(found).any()


def test_sorting_stops_when_enough_are_told_apart() -> None:
    some = points(3, 2, 1000)
    full = np.asarray(ranks_of(some))
    found = np.asarray(ranks_of(some, enough=5))
    last = np.sort(full)[4]
    assert full.max() > last + 1
    np.testing.assert_array_equal(found, np.minimum(full, last + 1))


def test_infinite_points_come_last() -> None:
    some = np.array([[1, 2], [np.inf, np.inf], [2, 1], [np.inf, np.inf]], np.float32)
    assert ranks_of(some).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform: str) -> None:
    program = jax.jit(lambda some: crowding_distance(some, nondominated_ranks(some)))
    shape = jax.ShapeDtypeStruct((8, 2), jnp.float32)
    assert jax.export.export(program, platforms=[platform])(shape).platforms == (platform,)
