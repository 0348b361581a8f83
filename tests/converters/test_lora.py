"""LoRA adapters in memory: exact sums, best approximations, merges by any operator, and adapters on Flax trees."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.converters import CheckpointError, lora
from jaxmerge.converters.lora import factors as factors_module
from jaxmerge.converters.lora.orthonormal import orthonormal
from jaxmerge.tree import Layout, TensorLayout


def low_rank(seed, rank=2, shape=(6, 5)):
    rng = np.random.default_rng(seed)
    columns = int(np.prod(shape[1:]))
    left, right = rng.normal(size=(shape[0], rank)), rng.normal(size=(rank, columns))
    return lora.LowRank(jnp.float32(left), jnp.float32(right), shape)


def dense(term):
    """In float64."""
    return (np.float64(term.left) @ np.float64(term.right)).reshape(term.shape)


def best(matrix, rank):
    """The nearest matrix of a rank, by NumPy in float64."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank], s


def adapter(*seeds, rank=2, names=("q.weight", "v.weight")):
    return lora.LoraAdapter({n: low_rank(s, rank) for n, s in zip(names, seeds, strict=False)})


# Factors ---------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    shape=st.sampled_from([(6, 5), (3, 8), (4, 2, 3)]),
    seed=st.integers(0, 99),
)
def test_sums_have_no_cross_terms(ranks, shape, seed):
    terms = [low_rank(seed + i, rank, shape) for i, rank in enumerate(ranks)]
    weights = np.random.default_rng(seed).normal(size=len(terms))
    total = lora.low_rank_sum(terms, weights)
    expected = sum(w * dense(term) for w, term in zip(weights, terms, strict=True))
    assert total.rank == sum(ranks)
    np.testing.assert_allclose(total.dense(), expected, atol=2e-5)


def test_inner_products_are_those_of_the_dense_tensors():
    a, b = low_rank(0, 2), low_rank(1, 3)
    np.testing.assert_allclose(lora.inner(a, b), np.vdot(dense(a), dense(b)), rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_truncation_is_the_best_approximation(rank):
    term = low_rank(0, rank=7, shape=(6, 4, 2))
    expected, s = best(dense(term).reshape(6, 8), rank)
    found = lora.truncate(term, rank=rank)
    assert found.rank == min(rank, 6)
    np.testing.assert_allclose(found.dense().reshape(6, 8), expected, atol=1e-4)
    # The factors share the singular values evenly.
    norms = np.sum(np.square(np.float64(found.left)), axis=0)
    np.testing.assert_allclose(norms, s[: found.rank], rtol=1e-4)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("reduce", [lora.truncate, lambda t, **k: lora.factorise(t.dense(), **k)])
def test_energy_chooses_the_smallest_rank_that_holds_it(energy, reduce):
    term = low_rank(3, rank=5, shape=(7, 9))
    _, s = best(dense(term), 1)
    shares = np.cumsum(s**2) / np.sum(s**2)
    expected = int(np.argmax(shares >= energy - 1e-6)) + 1
    assert reduce(term, energy=energy).rank == expected
    assert reduce(term, energy=energy, rank=1).rank == 1


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, np.inf])
def test_columns_become_orthonormal_whatever_their_condition(condition):
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.normal(size=(60, 6)))[0]
    v = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a = (u * condition ** -np.linspace(0, 1, 6)) @ v if condition < np.inf else np.zeros((60, 6))
    q, r = jax.jit(orthonormal)(jnp.float32(a))
    np.testing.assert_allclose(np.float64(q).T @ np.float64(q), np.eye(6), atol=2e-5)
    np.testing.assert_allclose(q @ r, a, atol=2e-6)
    np.testing.assert_allclose(np.tril(r, -1), 0, atol=1e-7)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_a_randomised_svd_finds_the_leading_triplets(shape):
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.normal(size=(shape[0], 30)))[0]
    v = np.linalg.qr(rng.normal(size=(shape[1], 30)))[0]
    s = 0.7 ** np.arange(30)
    a = (u * s) @ v.T
    found = lora.randomised_svd(jnp.float32(a), jax.random.key(0), rank=5)
    np.testing.assert_allclose(found.s, s[:5], rtol=1e-4)
    product = (np.asarray(found.u) * np.asarray(found.s)) @ found.v
    np.testing.assert_allclose(product, best(a, 5)[0], atol=2e-3)
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(5), atol=1e-5)
    with pytest.raises(ValueError, match="expected a rank between 1 and 40, found 41"):
        lora.randomised_svd(jnp.float32(a), jax.random.key(0), rank=41)


def test_a_large_matrix_is_factored_by_growing_random_subspaces(monkeypatch):
    monkeypatch.setattr(factors_module, "_SMALL", 8)
    monkeypatch.setattr(factors_module, "_FIRST_RANK", 4)
    term = low_rank(0, rank=7, shape=(60, 50))
    found = lora.factorise(term.dense(), energy=0.999)
    assert 5 <= found.rank <= 7
    error = np.sum((np.float64(found.dense()) - dense(term)) ** 2)
    assert error <= 1.01e-3 * np.sum(dense(term) ** 2)
    found = lora.factorise(term.dense(), rank=7)
    np.testing.assert_allclose(found.dense(), dense(term), atol=1e-4)


def test_zeros_have_factors():
    found = lora.factorise(jnp.zeros((4, 3)), energy=0.5)
    assert (found.rank, float(jnp.sum(jnp.abs(found.dense())))) == (1, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected a rank or an energy, found neither"),
        ({"rank": 0}, "a rank of at least 1, found 0"),
        ({"energy": 1.5}, r"an energy in \(0, 1\], found 1\.5"),
    ],
)
def test_ranks_and_energies_have_bounds(options, message):
    for call in (
        partial(lora.truncate, low_rank(0)),
        partial(lora.factorise, jnp.ones((2, 2))),
        partial(lora.merge_loras, "ties", [adapter(0)]),
        partial(lora.extract_lora, {}, {}),
    ):
        with pytest.raises(ValueError, match=message):
            call(**options)


# Adapters --------------------------------------------------------------------------------------


def test_adapters_are_added_exactly_and_shortened_as_asked():
    a, b = adapter(0, 1), adapter(2, rank=3)
    found = lora.add_loras([a, b], [0.5, -2.0])
    expected = 0.5 * dense(a.updates["q.weight"]) - 2 * dense(b.updates["q.weight"])
    np.testing.assert_allclose(found.updates["q.weight"].dense(), expected, atol=1e-5)
    np.testing.assert_allclose(
        found.updates["v.weight"].dense(), 0.5 * dense(a.updates["v.weight"]), atol=1e-6
    )
    short = lora.add_loras([a, b], [0.5, -2.0], rank=2).updates["q.weight"]
    assert short.rank == 2
    np.testing.assert_allclose(short.dense(), best(expected, 2)[0], atol=1e-4)


def test_weights_of_a_sum_are_differentiable_and_map_over_populations():
    adapters = [adapter(0, 1), adapter(2, 3)]

    def size(weights):
        total = lora.add_loras(adapters, weights).updates["q.weight"]
        return lora.inner(total, total)

    weights = jnp.float32([[1.0, 0.0], [0.5, 2.0]])
    first, second = (dense(one.updates["q.weight"]) for one in adapters)
    expected = [np.sum((x * first + y * second) ** 2) for x, y in np.float64(weights)]
    np.testing.assert_allclose(jax.vmap(size)(weights), expected, rtol=1e-5)
    gradient = jax.grad(size)(weights[1])
    at = 0.5 * first + 2 * second
    np.testing.assert_allclose(
        gradient, [2 * np.vdot(at, first), 2 * np.vdot(at, second)], rtol=1e-4
    )


@pytest.mark.parametrize("name", ["ties", "dare_linear", "magmax"])
def test_any_operator_merges_adapters_as_it_merges_the_models(name):
    a, b = adapter(0, 1), adapter(2, 3)
    key = jax.random.key(0) if name == "dare_linear" else None
    base = {n: jnp.zeros((6, 5)) for n in a.updates}
    options = {} if name == "magmax" else {"density": 0.5}
    dense_models = [lora.apply_lora(base, one) for one in (a, b)]
    expected = jm.merge(name, dense_models, base=base, key=key, **options)
    found = lora.merge_loras(name, [a, b], rank=5, key=key, **options)
    for n, update in found.updates.items():
        np.testing.assert_allclose(update.dense(), expected[n], atol=1e-5)


def test_an_adapter_that_leaves_a_tensor_alone_counts_as_zero_there():
    a, b = adapter(0, 1), adapter(2)
    found = lora.merge_loras("linear", [a, b], rank=5).updates["v.weight"].dense()
    np.testing.assert_allclose(found, dense(a.updates["v.weight"]) / 2, atol=1e-5)


def test_what_has_no_task_vector_of_its_own_is_refused():
    whole = lora.LoraAdapter({}, {"norm.weight": jnp.ones(3)})
    scaled = lora.LoraAdapter({"q.weight": low_rank(0)}, {}, {"q.weight": jnp.ones(6)})
    for one, what in ((whole, "trained whole"), (scaled, "DoRA's magnitudes")):
        with pytest.raises(ValueError, match=what):
            lora.add_loras([one])
        with pytest.raises(ValueError, match=what):
            lora.merge_loras("ties", [one], rank=1)
        with pytest.raises(ValueError, match="use apply_lora"):
            lora.task_vectors(one)
    with pytest.raises(ValueError, match="at least one adapter"):
        lora.add_loras([])
    with pytest.raises(ValueError, match="expected 1 weights, one per adapter"):
        lora.add_loras([adapter(0)], [1.0, 2.0])
    other = lora.LoraAdapter({"q.weight": low_rank(0, shape=(4, 4))})
    with pytest.raises(ValueError, match=r"'q.weight' have the shapes \[\[4, 4\], \[6, 5\]\]"):
        lora.add_loras([adapter(0), other])


# Applied to models -----------------------------------------------------------------------------


def test_an_adapter_is_added_under_other_prefixes_and_keeps_dtypes():
    model = {"model.q.weight": jnp.ones((6, 5), jnp.bfloat16), "norm.weight": jnp.zeros(3)}
    update = low_rank(0)
    given = lora.LoraAdapter({"q.weight": update}, {"norm.weight": jnp.arange(3.0)})
    found = lora.apply_lora(model, given, scale=0.5)
    assert found["model.q.weight"].dtype == jnp.bfloat16
    expected = 1 + 0.5 * dense(update)
    np.testing.assert_allclose(
        np.float32(found["model.q.weight"]), expected, atol=0.02 * np.max(np.abs(expected))
    )
    np.testing.assert_array_equal(found["norm.weight"], [0, 1, 2])


def test_magnitudes_scale_the_rows_of_the_sum():
    update, magnitudes = low_rank(0), jnp.arange(1.0, 7.0)
    given = lora.LoraAdapter({"q.weight": update}, {}, {"q.weight": magnitudes})
    found = lora.apply_lora({"q.weight": jnp.ones((6, 5))}, given)["q.weight"]
    summed = 1 + dense(update)
    expected = np.arange(1, 7)[:, None] * summed / np.linalg.norm(summed, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_transposed_and_stacked_leaves_get_their_layers_updates():
    layout = Layout(
        {"layers/q/kernel": TensorLayout(("0.q.weight", "1.q.weight"), axes=(1, 0), stacked=True)}
    )
    model = {"layers": {"q": {"kernel": jnp.zeros((2, 5, 6))}}}
    given = lora.LoraAdapter({"1.q.weight": low_rank(0)})
    found = jax.jit(lambda s: lora.apply_lora(model, given, scale=s, layout=layout))(2.0)
    kernel = found["layers"]["q"]["kernel"]
    np.testing.assert_array_equal(kernel[0], 0)
    np.testing.assert_allclose(kernel[1], 2 * dense(given.updates["1.q.weight"]).T, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"k.weight": jnp.ones((6, 5))}, r"'q.weight', which the model does not have"),
        ({"q.weight": jnp.ones((5, 6))}, r"'q.weight' has shape \[6, 5\], the model's \[5, 6\]"),
    ],
)
def test_an_adapter_of_another_model_is_refused(model, message):
    with pytest.raises(CheckpointError, match=message):
        lora.apply_lora(model, adapter(0))
