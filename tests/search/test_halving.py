"""Successive halving: survivors see more, and a good candidate survives."""

import itertools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmerge.search.halving import Halving, Rung, cost, rungs, successive_halving


@given(st.integers(1, 200), st.integers(1, 500), st.integers(1, 500), st.floats(1.05, 8))
def test_plans_end_with_all_examples_and_never_cost_more(
    candidates: int, examples: int, first: int, factor: float
) -> None:
    plan = rungs(candidates, examples, first=min(first, examples), factor=factor)
    assert plan[0].candidates == candidates
    assert plan[-1].examples == examples
    assert all(a.examples < b.examples for a, b in itertools.pairwise(plan))
    assert all(a.candidates >= b.candidates >= 1 for a, b in itertools.pairwise(plan))
    assert cost(plan) <= candidates * examples


def squared(guess: jax.Array, seen: jax.Array) -> jax.Array:
    return (guess - seen) ** 2


PLAN = rungs(16, 64, first=8)


@jax.jit
@chex.assert_max_traces(n=1)
def halve(guesses: jax.Array, targets: jax.Array) -> Halving:
    return successive_halving(squared, guesses, targets, PLAN)


def test_halving_is_the_loop_that_it_replaces() -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        guesses, targets = (rng.normal(size=n).astype(np.float32) for n in (16, 64))
        place, loss, seen = halve(guesses, targets)
        alive = np.arange(16)
        expected_seen = np.zeros(16, int)
        means = np.zeros(16)
        for rung in PLAN:
            alive = alive[np.argsort(means[alive], kind="stable")][: rung.candidates]
            for i in alive:
                means[i] = np.mean((guesses[i].astype(float) - targets[: rung.examples]) ** 2)
                expected_seen[i] = rung.examples
        np.testing.assert_array_equal(seen, expected_seen)
        np.testing.assert_allclose(loss, means, rtol=1e-5)
        order = sorted(range(16), key=lambda i: (-expected_seen[i], means[i]))
        np.testing.assert_array_equal(np.argsort(place), order)


def test_chunks_change_nothing() -> None:
    rng = np.random.default_rng(0)
    guesses, targets = jnp.asarray(rng.normal(size=16)), jnp.asarray(rng.normal(size=64))
    whole = halve(guesses, targets)
    parts = jax.jit(lambda g, t: successive_halving(squared, g, t, PLAN, chunk=3))(guesses, targets)
    np.testing.assert_array_equal(whole.place, parts.place)
    np.testing.assert_allclose(whole.loss, parts.loss, rtol=1e-6)


def test_what_is_not_finite_goes_first() -> None:
    guesses = jnp.array([jnp.nan, 0.5, jnp.inf, 0.0])
    found = successive_halving(squared, guesses, jnp.zeros(8), rungs(4, 8, first=2))
    assert found.place[3] == 0
    assert found.place[1] == 1
    assert found.seen.tolist() == [2, 4, 2, 8]


def test_candidates_and_examples_may_be_trees() -> None:
    candidates = {"w": jnp.array([[1.0], [2.0]]), "b": jnp.zeros(2)}
    examples = (jnp.ones((4, 1)), jnp.full(4, 2.0))

    def evaluate(one: dict[str, jax.Array], seen: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = seen
        return jnp.abs(x @ one["w"] + one["b"] - y)

    found = successive_halving(evaluate, candidates, examples, rungs(2, 4, first=1))
    assert found.place.tolist() == [1, 0]


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="found 4 candidates, first 9, 8 examples"):
        rungs(4, 8, first=9)
    with pytest.raises(ValueError, match="must exceed 1, found 1"):
        rungs(4, 8, first=1, factor=1)
    with pytest.raises(ValueError, match="for 4 candidates and 8 examples, found 3 and 8"):
        successive_halving(squared, jnp.zeros(3), jnp.zeros(8), rungs(4, 8, first=1))
    assert rungs(4, 8, first=8) == (Rung(4, 8),)
