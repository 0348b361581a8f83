"""Kronecker factors against gradients written out in NumPy float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.statistics import batch_factors, kronecker_factors


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def f64(x):
    return np.asarray(x, np.float64)


def mlp(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"].T


PARAMS = {"w": normal(0, 3, 4), "b": normal(1, 4), "v": normal(2, 5, 4)}


def gradients(x, y):
    """Per example, of log p(y | x) with respect to what each layer puts out."""
    w, b, v = (f64(PARAMS[name]) for name in "wbv")
    hidden = np.tanh(f64(x) @ w + b)
    logits = hidden @ v.T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    last = np.eye(5)[np.asarray(y)] - p / p.sum(-1, keepdims=True)
    return hidden, (last @ v) * (1 - hidden**2), last


def test_factors_are_means_over_the_examples_of_all_batches():
    x, y = normal(3, 6, 3), jnp.array([0, 1, 2, 3, 4, 0])
    traced = chex.assert_max_traces(mlp, n=2)  # once to find the sites
    inputs, outputs = kronecker_factors(traced, PARAMS, [x[:3], x[3:]], labels=[y[:3], y[3:]])
    hidden, first, last = gradients(x, y)
    expected = {"w": (f64(x), first), "v": (hidden, last)}
    assert {path: (inputs[path].axes, outputs[path].axes) for path in inputs} == {
        "w": ((0,), (1,)),
        "v": ((1,), (0,)),
    }
    for path, (a, g) in expected.items():
        np.testing.assert_allclose(inputs[path].matrix, a.T @ a / 6, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(outputs[path].matrix, g.T @ g / 6, rtol=1e-4, atol=1e-5)


def test_drawn_classes_give_the_fisher_information_of_the_model():
    # Of a softmax the Fisher information is diag(p) - p p^T in the logits.
    params, x = {"w": normal(0, 2, 3)}, jnp.tile(normal(1, 1, 2), (4000, 1))
    apply_fn = lambda params, x: x @ params["w"]  # noqa: E731
    _, outputs = kronecker_factors(apply_fn, params, [x], key=jax.random.key(0))
    _, again = kronecker_factors(apply_fn, params, [x], key=jax.random.key(0))
    p = jax.nn.softmax(apply_fn(params, x[0]))
    np.testing.assert_allclose(outputs["w"].matrix, np.diag(p) - np.outer(p, p), atol=0.02)
    chex.assert_trees_all_equal(outputs, again)


def test_positions_share_an_examples_log_probability():
    def apply_fn(params, x):
        scores = jnp.einsum("btd,bsd->bts", x, x)
        mixed = jnp.einsum("bts,bsd->btd", scores, x)
        return jnp.einsum(
            "bthe,hec->btc", jnp.einsum("btd,dhe->bthe", mixed, params["q"]), params["o"]
        )

    params, x = {"q": normal(0, 3, 2, 2), "o": normal(1, 2, 2, 3)}, normal(2, 2, 4, 3)
    labels = jnp.array([[0, 1, 2, 2], [1, 1, 0, 2]])
    _, outputs = kronecker_factors(apply_fn, params, [x], labels=[labels])

    def log_probability(shift, x, y):
        scores = jnp.einsum("td,sd->ts", x, x)
        heads = jnp.einsum("td,dhe->the", scores @ x, params["q"]) + shift
        logits = jnp.einsum("the,hec->tc", heads, params["o"])
        return jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(y, 3))

    g = jax.vmap(lambda x, y: jax.grad(log_probability)(jnp.zeros((4, 2, 2)), x, y))(x, labels)
    g = f64(g).reshape(8, 4)
    assert outputs["q"].axes == (1, 2)
    np.testing.assert_allclose(outputs["q"].matrix, g.T @ g / 8, rtol=1e-3, atol=1e-4)


def test_layers_in_a_scan_have_the_factors_of_the_same_layers_written_out():
    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    def unrolled(params, x):
        for layer in ("0", "1", "2"):
            x = jnp.tanh(x @ params[layer])
        return x

    w, x = normal(0, 3, 4, 4), normal(1, 5, 4)
    labels = jnp.array([0, 1, 2, 3, 0])
    inputs, outputs = kronecker_factors(scanned, {"w": w}, [x], labels=[labels])
    for found, each in zip(
        (inputs, outputs),
        kronecker_factors(unrolled, {str(i): w[i] for i in range(3)}, [x], labels=[labels]),
        strict=True,
    ):
        expected = jnp.stack([each[str(i)].matrix for i in range(3)])
        np.testing.assert_allclose(found["w"].matrix, expected, rtol=1e-4, atol=1e-5)


def test_a_sliced_leaf_has_inputs_only_and_a_tied_one_the_sum_of_its_uses():
    def apply_fn(params, x):
        a, b = jnp.split(params["qk"], 2, axis=1)
        return (x @ a + x @ b) @ params["tied"] @ params["tied"]

    params, x = {"qk": normal(0, 3, 6), "tied": normal(1, 3, 3)}, normal(2, 4, 3)
    labels = jnp.array([0, 1, 2, 0])
    run = jax.jit(lambda params, x: batch_factors(apply_fn, params, x, labels=labels))
    inputs, outputs = run(params, x)
    assert (sorted(inputs), sorted(outputs)) == (["qk", "tied"], ["tied"])
    assert outputs["tied"].count == 8
    w = f64(params["tied"])
    logits = f64(x) @ (f64(params["qk"][:, :3]) + f64(params["qk"][:, 3:])) @ w @ w
    p = np.exp(logits - logits.max(-1, keepdims=True))
    last = np.eye(3)[np.asarray(labels)] - p / p.sum(-1, keepdims=True)
    first = last @ w.T
    np.testing.assert_allclose(
        outputs["tied"].total, first.T @ first + last.T @ last, rtol=1e-3, atol=1e-3
    )


def test_bad_input_is_named():
    x, y = normal(0, 2, 3), jnp.array([0, 1])
    with pytest.raises(ValueError, match="either key= "):
        kronecker_factors(mlp, PARAMS, [x])
    with pytest.raises(ValueError, match="either key= "):
        kronecker_factors(mlp, PARAMS, [x], key=jax.random.key(0), labels=[y])
    with pytest.raises(ValueError, match=r"integers of shape \[2\].*found int32 \[3\]"):
        kronecker_factors(mlp, PARAMS, [x], labels=[jnp.array([0, 1, 2])])
    with pytest.raises(ValueError, match="after 0 there are no more labels"):
        kronecker_factors(mlp, PARAMS, [x], labels=[])
    with pytest.raises(ValueError, match="at least one batch"):
        kronecker_factors(mlp, PARAMS, [], key=jax.random.key(0))
