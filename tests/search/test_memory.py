"""Chunks planned from the memory that a candidate takes."""

import jax
import jax.numpy as jnp
import pytest

from jaxmerge.search.memory import bytes_of_candidate, plan_chunk


def nbytes(function: object, *shapes: tuple[int, ...]) -> int:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    closed = jax.make_jaxpr(function)(*arrays)  # type: ignore[arg-type]
    return bytes_of_candidate(closed, [i == 0 for i in range(len(shapes))])


def test_what_is_alive_at_once_counts() -> None:
    def chain(x: jax.Array) -> jax.Array:
        for _ in range(10):
            x = jnp.sin(x)
        return jnp.sum(x)

    # One array and its successor, never all ten.
    assert nbytes(chain, (1000,)) == 2 * 4000


def test_what_all_candidates_share_does_not() -> None:
    def shared(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(weights)) * x

    assert nbytes(shared, (), (1000, 1000)) == 4


def test_loops_and_calls_count_what_is_within() -> None:
    def looped(x: jax.Array, weights: jax.Array) -> jax.Array:
        def step(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
            return jnp.sum(jax.jit(jnp.outer)(row * carry, row)), None

        return jax.lax.scan(step, x, weights)[0]

    assert 100 * 100 * 4 <= nbytes(looped, (), (7, 100)) <= 3 * 100 * 100 * 4


def test_chunks_fill_the_memory_that_is_free() -> None:
    assert plan_chunk(1024, 10**8, 10**10, "gpu") == 60
    assert plan_chunk(16, 10**8, 10**10, "gpu") == 16
    assert plan_chunk(1024, 10**9, 10**9, "gpu") == 1
    # A CPU batches only what is small.
    assert plan_chunk(1024, 2**20, 10**10, "cpu") == 1
    assert plan_chunk(1024, 2**10, 10**10, "cpu") == 256


def test_one_candidate_too_large_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"one candidate needs about 3 GB of memory; 2 GB are free"
    ):
        plan_chunk(8, 3 * 10**9, 2 * 10**9, "gpu")
