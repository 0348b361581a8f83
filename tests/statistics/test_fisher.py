"""The diagonal Fisher information against gradients written out by hand, and its streaming."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import data_driven

from jaxmerge.statistics import batch_fisher, fisher

EXAMPLES, INPUTS, HIDDEN, CLASSES = 8, 3, 4, 5


def mlp(params: Any, x: jax.Array) -> jax.Array:
    """[examples, *positions, inputs] -> [examples, *positions, classes]."""
    hidden = jnp.tanh(jnp.matmul(x, params["w"], precision="highest"))
    bias = jnp.expand_dims(params["bias"], tuple(range(x.ndim - 1)))
    return jnp.matmul(hidden, params["v"], precision="highest") + bias


def scores(params: Any, x: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Gradients of log p(c | x) [examples, classes, *shape] and p [examples, classes], in float64."""
    w, v, bias = (np.asarray(params[name], np.float64) for name in ("w", "v", "bias"))
    x = np.asarray(x, np.float64)
    hidden = np.tanh(x @ w)
    logits = hidden @ v + bias
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = np.eye(v.shape[1]) - p[:, None, :]  # e_c - p
    back = (out @ v.T) * (1 - hidden**2)[:, None, :]
    return {
        "w": x[:, None, :, None] * back[:, :, None, :],
        "v": hidden[:, None, :, None] * out[:, :, None, :],
        "bias": out,
    }, p


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PARAMS = {
    "w": draw(INPUTS, HIDDEN, seed=1),
    "v": draw(HIDDEN, CLASSES, seed=2),
    "bias": draw(CLASSES, seed=3),
}
X = draw(EXAMPLES, INPUTS, seed=4)
LABELS = np.arange(EXAMPLES) % CLASSES
GRADIENTS, P = scores(PARAMS, X)
EXACT = {name: data_driven.exact_fisher(g, P) for name, g in GRADIENTS.items()}
EMPIRICAL = {
    name: data_driven.empirical_fisher(g[np.arange(EXAMPLES), LABELS])
    for name, g in GRADIENTS.items()
}


def close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("chunk", [3, 15])
def test_exact_is_the_oracle_however_the_work_is_cut(chunk: int) -> None:
    # 3: the classes of one example in two blocks, unequal. 15: 3 examples at once, which 8 are no multiple of.
    close(fisher(mlp, PARAMS, [X], chunk=chunk), EXACT)


def test_empirical_is_the_oracle_however_the_work_is_cut() -> None:
    close(fisher(mlp, PARAMS, [(X, LABELS)], kind="empirical", chunk=3), EMPIRICAL)
    batches = iter([(X[:4], LABELS[:4]), [X[4:], jnp.asarray(LABELS[4:])]])
    close(fisher(mlp, PARAMS, batches, kind="empirical"), EMPIRICAL)


def test_softmax_regression_has_its_textbook_fisher() -> None:
    # d log p(c) / d W = x (e_c - p)^T, and sum_c p_c (e_c - p)_k^2 = p_k (1 - p_k).
    w = draw(INPUTS, CLASSES, seed=5)
    logits = X.astype(np.float64) @ w
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (X.astype(np.float64) ** 2).T @ (p * (1 - p)) / EXAMPLES
    found = fisher(lambda params, x: jnp.matmul(x, params, precision="highest"), w, [X])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_it_is_not_the_square_of_the_batch_gradient() -> None:
    # Two examples of opposite labels cancel in the batch's gradient; each still informs.
    def coin(params: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.stack([0 * x, params + 0 * x], axis=-1)

    x, labels = jnp.zeros(2), jnp.array([0, 1])

    def loss(params: jax.Array) -> jax.Array:
        return -jax.nn.log_softmax(coin(params, x))[jnp.arange(2), labels].mean()

    assert float(jax.grad(loss)(0.0)) == 0
    assert float(fisher(coin, 0.0, [(x, labels)], kind="empirical")) == pytest.approx(0.25)


def test_sampled_has_the_exact_fisher_as_its_mean() -> None:
    key = jax.random.key(0)
    found = fisher(mlp, PARAMS, [X], kind="sampled", key=key, samples=4000, chunk=400)
    for name, expected in EXACT.items():
        assert np.max(np.abs(found[name] - expected)) < 0.1 * np.max(expected)


def test_draws_depend_on_the_key_and_the_place_in_the_stream_alone() -> None:
    def sampled(batches: list[np.ndarray], seed: int, chunk: int = 16) -> Any:
        key = jax.random.key(seed)
        return fisher(mlp, PARAMS, batches, kind="sampled", key=key, samples=2, chunk=chunk)

    whole = sampled([X], 0)
    close(sampled([X[:4], X[4:]], 0, chunk=3), whole)
    assert np.max(np.abs(sampled([X], 1)["bias"] - whole["bias"])) > 1e-3


def test_batches_of_one_shape_and_models_of_one_shape_share_a_program() -> None:
    traces = []

    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        traces.append(x.shape)
        return mlp(params, x)

    fisher(apply_fn, PARAMS, [(X, LABELS)], kind="empirical")
    first = len(traces)
    other = {name: 2 * leaf for name, leaf in PARAMS.items()}
    fisher(apply_fn, other, [(X, LABELS), (-X, LABELS), (2 * X, LABELS)], kind="empirical")
    # One trace told the shape of the outputs, one was differentiated; none followed.
    assert first == len(traces) == 2
    assert all(shape[0] == 1 for shape in traces)


def test_positions_add_up_and_masked_ones_do_not_count() -> None:
    x = draw(3, 2, INPUTS, seed=6)  # [examples, positions, inputs]
    labels = np.array([[0, 1], [2, 3], [4, 0]])
    kept = np.array([[True, True], [True, False], [False, False]])
    gradients, p = scores(PARAMS, x.reshape(6, INPUTS))
    some = kept.ravel()
    exact = {  # 2 of the 3 examples have an output that counts
        n: data_driven.exact_fisher(g[some], p[some]) * some.sum() / 2 for n, g in gradients.items()
    }

    def mask(inputs: jax.Array) -> jax.Array:
        return inputs[..., 0] != 9.0

    padded = np.where(kept[..., None], x, np.float32(9.0))
    close(fisher(mlp, PARAMS, [padded], mask=mask), exact)

    chosen = {n: g[np.arange(6), labels.ravel()] * some.reshape(6, *[1] * (g.ndim - 2))
              for n, g in gradients.items()}  # fmt: skip
    summed = {n: g.reshape(3, 2, *g.shape[1:]).sum(axis=1)[:2] for n, g in chosen.items()}
    empirical = {n: data_driven.empirical_fisher(g) for n, g in summed.items()}
    labels[1, 1] = -100  # the mask drops the third example, the label this output
    seen = kept | (np.arange(3) == 1)[:, None]
    half = np.where(seen[..., None], x, np.float32(9.0))
    close(fisher(mlp, PARAMS, [(half, labels)], kind="empirical", mask=mask), empirical)


def test_a_batch_is_pure_and_maps_over_stacked_models() -> None:
    stacked = {name: np.stack([leaf, 2 * leaf]) for name, leaf in PARAMS.items()}
    sums, count = jax.jit(jax.vmap(lambda params: batch_fisher(mlp, params, X)))(stacked)
    assert count.tolist() == [EXAMPLES, EXAMPLES]
    close({name: leaf[0] / EXAMPLES for name, leaf in sums.items()}, EXACT)


def test_leaves_keep_their_structure_and_get_wide_floats() -> None:
    params = {"half": jnp.ones((2, 2), jnp.bfloat16), "steps": jnp.arange(3), "scale": 1.0}

    def apply_fn(params: Any, x: dict[str, jax.Array]) -> jax.Array:
        return params["scale"] * (x["a"].astype(jnp.bfloat16) @ params["half"])

    found = fisher(apply_fn, params, [{"a": X[:, :2]}])
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found)} == {"float32"}
    np.testing.assert_array_equal(found["steps"], np.zeros(3))
    assert float(found["half"].min()) > 0


def test_a_class_of_no_probability_adds_nothing() -> None:
    def apply_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.where((jnp.arange(CLASSES) < 2)[None], mlp(params, x), -jnp.inf)

    found = fisher(apply_fn, PARAMS, [X])
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in found.values())
    np.testing.assert_array_equal(found["bias"][2:], 0)
    assert float(found["bias"][0]) > 0


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "at least one example: batches is empty"),
        ([X[:0]], {}, "batch 0: the Fisher information needs at least one example"),
        ([X], {"mask": lambda x: x[:, 0] > 1e9}, "all outputs are masked"),
        ([X], {"mask": lambda x: x > 0}, r"mask returns .* = \[8\], found \[8, 3\]"),
        (X, {}, "put one batch in a list"),
        ({"x": X}, {}, "put one batch in a list"),
        ([{"a": X, "b": X[:2]}], {}, r"one number of examples, found {'a': \[8, 3\], 'b': \[2, 3\]"),
        ([X], {"kind": "emprical"}, "did you mean 'empirical'"),
        ([X], {"kind": "sampled"}, "needs key="),
        ([X], {"kind": "empirical"}, r"batch 0: .* pairs \(inputs, labels\)"),
        ([X], {"chunk": 0}, "chunk is at least 1"),
        ([(X, LABELS[:3])], {"kind": "empirical"}, r"batch 0: labels .* = \[8\], found \[3\]"),
        ([(X, LABELS * 1.0)], {"kind": "empirical"}, "labels are integers, found float"),
        ([(X, LABELS + 1)], {"kind": "empirical"}, "labels are below 5, the classes; found 5"),
    ],
)  # fmt: skip
def test_bad_input_is_named(batches: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher(mlp, PARAMS, batches, **options)


def test_a_bad_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"returns logits .* found \[1\] for one example"):
        fisher(lambda params, x: x[:, 0] * params, 1.0, [X])
    with pytest.raises(ValueError, match=r"returns logits .* found tuple"):
        fisher(lambda params, x: (x * params, x), 1.0, [X])
    with pytest.raises(ValueError, match="no floating-point leaf"):
        fisher(lambda params, x: x, {"steps": np.arange(3)}, [X])
    with pytest.raises(ValueError, match="takes no labels"):
        batch_fisher(mlp, PARAMS, X, LABELS)
