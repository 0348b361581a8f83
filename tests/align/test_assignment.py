"""Linear assignment: every solver is exact, ties or not, in programs and out of them."""

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import jaxmerge as jm

SOLVERS = ["scipy", "hungarian", "paths", "auto"]


def total(similarity: np.ndarray, columns: np.ndarray) -> float:
    picked = np.take_along_axis(similarity.astype(np.float64), columns[..., None], -1)
    return float(picked.sum())


def best(similarity: np.ndarray) -> float:
    rows, columns = linear_sum_assignment(similarity.astype(np.float64), maximize=True)
    return float(similarity.astype(np.float64)[rows, columns].sum())


def matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((24, 40))
    b = a[rng.permutation(24)] + 0.8 * rng.standard_normal((24, 40))
    dead = rng.standard_normal((24, 24))
    dead[::2] = 0
    return {
        "random": rng.standard_normal((24, 24)),
        "correlations": np.corrcoef(a, b)[:24, 24:],
        "few values": rng.integers(0, 3, (24, 24)).astype(float),
        "dead rows": dead,
        "dead rows and columns": dead * (np.arange(24) % 3 > 0),
        "constant": np.full((24, 24), 0.25),
        "one": np.array([[2.0]]),
        "wide range": rng.standard_normal((24, 24)) * 10.0 ** rng.integers(-3, 4, (24, 24)),
    }


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", matrices())
def test_the_assignment_is_the_best(solver: str, name: str) -> None:
    similarity = matrices()[name].astype(np.float32)
    columns = np.asarray(jm.align.assign(similarity, solver))
    assert sorted(columns.tolist()) == list(range(len(similarity)))
    size = np.ptp(similarity) * len(similarity)
    assert total(similarity, columns) >= best(similarity) - 2.0**-24 * size


@settings(max_examples=30)
@given(st.integers(0, 2**31 - 1), st.integers(1, 4))
def test_our_solver_is_exact_on_small_integers(seed: int, values: int) -> None:
    similarity = np.random.default_rng(seed).integers(0, values, (7, 7)).astype(np.float32)
    columns = np.asarray(jm.align.assign(similarity, "paths"))
    assert sorted(columns.tolist()) == list(range(7))
    assert total(similarity, columns) == best(similarity)


@pytest.mark.parametrize("solver", SOLVERS)
def test_batches_and_vmap_give_what_single_matrices_give(solver: str) -> None:
    similarity = np.random.default_rng(1).standard_normal((2, 3, 5, 5)).astype(np.float32)
    expected = np.stack([[jm.align.assign(one, solver) for one in row] for row in similarity])
    assert np.array_equal(jm.align.assign(similarity, solver), expected)
    mapped = jax.jit(jax.vmap(lambda s: jm.align.assign(s, solver)))(similarity)
    assert np.array_equal(mapped, expected)


def test_one_trace_serves_all_values() -> None:
    solve = jax.jit(chex.assert_max_traces(lambda s: jm.align.assign(s, "paths"), 1))
    for seed in range(3):
        solve(jax.random.normal(jax.random.key(seed), (6, 6)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_not_finite_is_refused_or_marked(solver: str) -> None:
    similarity = np.zeros((2, 3, 3), np.float32)
    similarity[1, 0, 2] = np.nan
    with pytest.raises(ValueError, match=r"the similarity at \[1, 0, 2\] is nan"):
        jm.align.assign(similarity, solver)
    columns = jax.jit(lambda s: jm.align.assign(s, solver))(similarity)
    assert sorted(np.asarray(columns[0]).tolist()) == [0, 1, 2]
    assert columns[1].tolist() == [-1, -1, -1]


def test_bad_shapes_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[..., n, n\] was expected, found \[2, 3\]"):
        jm.align.assign(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="unknown solver 'auction'"):
        jm.align.assign(np.zeros((2, 2)), "auction")  # type: ignore[arg-type]
    assert jm.align.assign(np.zeros((4, 0, 0))).shape == (4, 0)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators_without_a_callback(platform: str) -> None:
    exported = jax.export.export(jax.jit(jm.align.assign), platforms=[platform])(
        jax.ShapeDtypeStruct((4, 8, 8), jnp.float32)
    )
    assert "python_cpu" not in exported.mlir_module()


def test_soft_assignment_has_the_marginals_and_gradients() -> None:
    similarity = jax.random.normal(jax.random.key(0), (5, 7))
    plan = jm.align.sinkhorn(similarity, 0.3, iterations=300)
    np.testing.assert_allclose(jnp.sum(plan, 1), 1 / 5, atol=1e-5)
    np.testing.assert_allclose(jnp.sum(plan, 0), 1 / 7, atol=1e-6)
    gradient = jax.grad(lambda s: jnp.sum(jm.align.sinkhorn(s, 0.3) * similarity))(similarity)
    assert jnp.all(jnp.isfinite(gradient))


def test_soft_assignment_turns_into_the_assignment() -> None:
    similarity = jax.random.normal(jax.random.key(2), (6, 6))
    plan = jm.align.sinkhorn(similarity, 0.01, iterations=2000)
    assert jnp.argmax(plan, 1).tolist() == jm.align.assign(similarity).tolist()
