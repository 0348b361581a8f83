"""Gram matrices of linear layers' inputs against NumPy float64."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.methods.extras import Gram
from jaxmerge.statistics import batch_grams, grams


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(shapes):
    return jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape), shapes)


def f64(x):
    return np.asarray(x, np.float64)


def gram(rows):
    rows = f64(rows).reshape(-1, np.shape(rows)[-1])
    return rows.T @ rows / len(rows)


def assert_gram(found, expected, axes):
    assert isinstance(found, Gram)
    assert found.axes == axes
    assert found.matrix.dtype == jnp.float32
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-4, atol=1e-4)


def mlp(params, x):
    x = jnp.maximum(x @ params["fc1"]["kernel"] + params["fc1"]["bias"][None], 0)
    return x @ params["fc2"]["kernel"]


MLP = {"fc1": {"kernel": normal(0, 3, 4), "bias": normal(1, 4)}, "fc2": {"kernel": normal(2, 4, 2)}}


def hidden(x):
    return np.maximum(f64(x) @ f64(MLP["fc1"]["kernel"]) + f64(MLP["fc1"]["bias"]), 0)


def test_batches_count_by_their_rows():
    batches = [normal(3, 5, 3), normal(4, 2, 3)]
    found = grams(mlp, MLP, iter(batches))
    assert list(found) == ["fc1/kernel", "fc2/kernel"]
    x = np.concatenate(batches)
    assert_gram(found["fc1/kernel"], gram(x), (0,))
    assert_gram(found["fc2/kernel"], gram(hidden(x)), (0,))


def test_batches_and_models_of_equal_shape_share_one_trace():
    traced = chex.assert_max_traces(mlp, n=1)
    batches = [normal(i, 4, 3) for i in range(3)]
    grams(traced, MLP, batches)
    grams(traced, jax.tree.map(lambda leaf: 2 * leaf, MLP), batches[:1])


def test_stacked_models_under_vmap_have_the_grams_of_each():
    models = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), MLP)
    x = normal(5, 2, 6, 3)
    run = jax.jit(jax.vmap(lambda params, x: batch_grams(mlp, params, x)))
    found = {path: sums.mean() for path, sums in run(models, x).items()}
    assert_gram(jax.tree.map(lambda leaf: leaf[0], found["fc2/kernel"]), gram(hidden(x[0])), (0,))
    assert_gram(jax.tree.map(lambda leaf: leaf[1], found["fc1/kernel"]), gram(x[1]), (0,))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Conv(3, (3, 2), strides=(2, 1), padding="SAME", name="first")(image))
        x = nn.Conv(2, (2, 2), padding="VALID", use_bias=False, name="second")(x)
        return nn.Dense(2, name="head")(x.mean((1, 2)))


def patches(image, window, strides, padding):
    """im2col of [n, height, width, channels], rows in the order of a kernel [kh, kw, in]."""
    image = np.pad(f64(image), [(0, 0), *padding, (0, 0)])
    (kh, kw), (sh, sw) = window, strides
    rows = [
        image[:, i : i + kh, j : j + kw].reshape(len(image), -1)
        for i in range(0, image.shape[1] - kh + 1, sh)
        for j in range(0, image.shape[2] - kw + 1, sw)
    ]
    return np.stack(rows, 1)


def test_a_convolutions_inputs_are_its_patches():
    image = normal(6, 2, 6, 5, 2)
    model = Convolutions()
    params = filled(jax.eval_shape(model.init, jax.random.key(0), image))
    found = grams(model.apply, params, [image])
    first, second, head = (params["params"][name] for name in ("first", "second", "head"))
    # SAME: 6 rows at stride 2 need 7, 5 columns at stride 1 need 6.
    rows = patches(image, (3, 2), (2, 1), [(0, 1), (0, 1)])
    assert_gram(found["params/first/kernel"], gram(rows), (0, 1, 2))
    x = np.maximum(rows @ f64(first["kernel"]).reshape(-1, 3) + f64(first["bias"]), 0)
    rows = patches(x.reshape(2, 3, 5, 3), (2, 2), (1, 1), [(0, 0), (0, 0)])
    np.testing.assert_allclose(
        found["params/second/kernel"].matrix, gram(rows), rtol=1e-3, atol=1e-3
    )
    x = (rows @ f64(second["kernel"]).reshape(-1, 2)).mean(1)
    np.testing.assert_allclose(found["params/head/kernel"].matrix, gram(x), rtol=1e-3, atol=1e-3)
    assert head["kernel"].shape == (2, 2)


def test_a_language_model_with_heads_and_a_tied_table():
    def apply_fn(params, tokens):
        x = params["table"][tokens]
        q, k, v = (jnp.einsum("btd,dhe->bhte", x, params[name]) for name in "qkv")
        scores = jax.nn.softmax(jnp.einsum("bhte,bhse->bhts", q, k))
        x = jnp.einsum("bhte,hed->btd", scores @ v, params["o"])
        return x @ params["table"].T

    shapes = {"table": (7, 6), "o": (2, 3, 6), **dict.fromkeys("qkv", (6, 2, 3))}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    tokens = jnp.array([[1, 2, 2], [0, 6, 5]])
    found = grams(apply_fn, params, [tokens])

    w = {name: f64(leaf) for name, leaf in params.items()}
    x = w["table"][np.asarray(tokens)]
    q, k, v = (np.einsum("btd,dhe->bhte", x, w[name]) for name in "qkv")
    scores = np.exp(np.einsum("bhte,bhse->bhts", q, k))
    mixed = np.einsum("bhts,bhse->bthe", scores / scores.sum(-1, keepdims=True), v)
    for name in "qkv":
        assert_gram(found[name], gram(x), (0,))
    assert_gram(found["o"], gram(mixed.reshape(2, 3, 6)), (0, 1))
    # Only the head is linear in the table: it contracts the axis of the features.
    np.testing.assert_allclose(
        found["table"].matrix, gram(np.einsum("bthe,hed->btd", mixed, w["o"])), rtol=1e-3, atol=1e-3
    )
    assert found["table"].axes == (1,)


def test_layers_that_a_scan_takes_from_a_stack_have_a_gram_each():
    @jax.jit
    def apply_fn(params, x):
        block = jax.checkpoint(lambda x, layer: jnp.tanh(x @ layer["w"]) @ layer["v"].T)
        return jax.lax.scan(lambda x, layer: (block(x, layer), None), x, params)[0]

    params, x = {"w": normal(0, 3, 4, 5), "v": normal(1, 3, 4, 5)}, normal(2, 6, 4)
    found = grams(apply_fn, params, [x, x])
    expected = {"w": [], "v": []}
    x = f64(x)
    for w, v in zip(f64(params["w"]), f64(params["v"]), strict=True):
        expected["w"].append(gram(x))
        x = np.tanh(x @ w)
        expected["v"].append(gram(x))
        x = x @ v.T
    assert_gram(found["w"], np.stack(expected["w"]), (0,))
    assert_gram(found["v"], np.stack(expected["v"]), (1,))


def test_uses_of_one_leaf_are_averaged_over_rows_and_other_axes_are_left_out():
    def apply_fn(params, inputs):
        return inputs["a"] @ params["w"], inputs["b"] @ params["w"] @ params["w"].T

    inputs = {"a": normal(0, 2, 3), "b": normal(1, 4, 3)}
    found = grams(apply_fn, {"w": normal(2, 3, 3)}, [inputs])
    assert_gram(found["w"], gram(np.concatenate([inputs["a"], inputs["b"]])), (0,))


def test_every_turn_of_a_loop_adds_rows():
    def apply_fn(params, x):
        return jax.lax.scan(
            lambda h, x: (jnp.tanh(h + x @ params["w"]), None), jnp.zeros((2, 4)), x
        )

    x = normal(0, 5, 2, 3)
    sums = jax.jit(lambda params: batch_grams(apply_fn, params, x))({"w": normal(1, 3, 4)})
    assert sums["w"].count == 10
    assert_gram(sums["w"].mean(), gram(x), (0,))


def test_patterns_choose_the_leaves():
    assert list(grams(mlp, MLP, [normal(0, 2, 3)], where=["fc2/*", "other"])) == ["fc2/kernel"]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least one batch"):
        grams(mlp, MLP, [])
    with pytest.raises(ValueError, match="put one batch in a list"):
        grams(mlp, MLP, normal(0, 2, 3))
    with pytest.raises(ValueError, match="did you mean 'fc1/kernel'"):
        grams(mlp, MLP, [normal(0, 2, 3)], where="fc1/kernle")
