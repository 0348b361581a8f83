"""RegMean++ against RegMean done layer by layer, outside the program."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import data_driven

from jaxmerge.learning import regmean_plus_plus
from jaxmerge.methods.operators.regmean import combine
from jaxmerge.statistics import grams


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def f64(x):
    return np.asarray(x, np.float64)


def filled(shapes, seed):
    return jax.tree.map(lambda leaf: normal(seed + leaf.size, *leaf.shape), shapes)


ONE_LAYER = jax.jit(combine)


def problem(models=3, out=4, size=6, rows=9):
    weights = normal(0, models, out, size)
    x = normal(1, models, rows, size)
    return weights, jnp.einsum("tni,tnj->tij", x, x) / rows


def oracle(weights, seen, weight=1.0, alpha=0.9, ridge=1e-6):
    """The oracle's ridge is absolute: `combine` takes it relative to the mean of the summed diagonal."""
    share = np.broadcast_to(np.asarray(weight, np.float64), (len(weights),))
    diagonal = np.einsum("t,tii->i", share, f64(seen))
    return data_driven.regmean(
        list(weights), list(seen), alpha, list(share), ridge * diagonal.mean()
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"weight": [0.5, 2.0, 0.1], "alpha": 0.7, "ridge": 0.1},
        {"weight": [1.0, -0.05, 1.0], "alpha": 0.0},
        {"alpha": 1.0, "ridge": 0.0},
    ],
)
def test_one_layer_agrees_with_the_oracle(values):
    weights, seen = problem()
    expected = oracle(weights, seen, **values)
    given = {"weight": np.broadcast_to(values.get("weight", 1.0), 3)}
    given |= {
        name: values.get(name, default) for name, default in (("alpha", 0.9), ("ridge", 1e-6))
    }
    given = {name: jnp.asarray(value, jnp.float32) for name, value in given.items()}
    np.testing.assert_allclose(ONE_LAYER(weights, seen, **given), expected, atol=1e-4)


def test_one_layer_where_the_sum_is_not_positive_is_the_mean_with_finite_gradients():
    weights, seen = problem()

    def total(values, weights, seen):
        out = combine(weights, seen, **values)
        return jnp.sum(out**2), out

    cases = {
        "cancelling": ([1.0, -1.0, 0.0], jnp.stack([seen[0]] * 3)),
        "nearly_cancelling": ([1.0, -0.9999999, 0.0], jnp.stack([seen[0]] * 3)),
        "negative": ([-1.0, -1.0, 0.5], seen),
        "indefinite": ([1.0, -0.9, 0.0], seen),
        "none": ([0.0, 0.0, 0.0], seen),
        "no_inputs": ([1.0, 1.0, 1.0], jnp.zeros_like(seen)),
    }
    values = {
        "weight": jnp.array([weight for weight, _ in cases.values()]),
        "alpha": jnp.ones(len(cases)),
        "ridge": jnp.full(len(cases), 1e-6),
    }
    run = jax.jit(jax.vmap(jax.grad(total, (0, 1, 2), has_aux=True), (0, None, 0)))
    gradients, out = run(values, weights, jnp.stack([seen for _, seen in cases.values()]))
    chex.assert_tree_all_finite(gradients)
    mean = jnp.tile(jnp.mean(weights, axis=0)[None], (len(cases), 1, 1))
    np.testing.assert_allclose(out, mean, atol=1e-5)


def test_fewer_inputs_than_dimensions_are_solved_for_where_they_reach():
    x = normal(0, 1, 5, 64)
    x = jnp.concatenate([x, 3 * x[:, :, ::-1]])
    seen = jnp.einsum("tni,tnj->tij", x, x, precision="highest")
    weights = normal(1, 2, 3, 64)
    scales = jnp.array([1e-12, 1.0, 1e12])
    run = jax.jit(jax.vmap(lambda scale: combine(weights, scale * seen, alpha=1.0, ridge=0.0)))
    for out in run(scales):
        # Ten rows cannot contradict each other in 64 dimensions: each model's outputs are kept.
        for w, inputs in zip(weights, x, strict=True):
            np.testing.assert_allclose(f64(inputs) @ f64(out).T, f64(inputs) @ f64(w).T, atol=0.01)


def test_gradients_of_one_layer_are_those_of_the_formula():
    weights, seen = problem()

    def value(weight, alpha, ridge):
        return jnp.sum(jnp.sin(combine(weights, seen, weight, alpha, ridge)))

    at = (jnp.array([0.5, 1.0, 2.0]), jnp.array(0.8), jnp.array(0.05))
    found = jax.jit(jax.grad(value, (0, 1, 2)))(*at)

    def slope(step):
        low, high = (
            [f64(one) + sign * 1e-5 * part for one, part in zip(at, step, strict=True)]
            for sign in (-1, 1)
        )

        def total(point):
            weight, alpha, ridge = point
            shrunk = f64(seen) * (alpha + (1 - alpha) * np.eye(6))
            diagonal = np.einsum("t,tii->i", weight, shrunk)
            return np.sum(np.sin(data_driven.regmean(
                list(weights), list(seen), float(alpha), list(weight), float(ridge * diagonal.mean())
            )))  # fmt: skip

        return (total(high) - total(low)) / 2e-5

    for i in range(3):
        step = (np.eye(3)[i], 0.0, 0.0)
        np.testing.assert_allclose(found[0][i], slope(step), rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(found[1], slope((0.0, 1.0, 0.0)), rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(found[2], slope((0.0, 0.0, 1.0)), rtol=1e-2, atol=1e-3)


def mlp(params, x):
    x = jnp.tanh(x @ params["fc1"]["kernel"] + params["fc1"]["bias"][None])
    return x @ params["fc2"]["kernel"].T


def mlps():
    return [
        {"fc1": {"kernel": normal(i, 3, 4), "bias": normal(i + 9, 4)}, "fc2": {"kernel": normal(i, 2, 4)}}
        for i in range(3)
    ]  # fmt: skip


def test_layers_are_merged_on_what_the_merged_layers_before_put_out():
    models, batches = mlps(), [normal(i, 8, 3) for i in range(20, 23)]
    values = {"weight": [1.0, 0.5, 2.0], "alpha": 0.8, "ridge": 0.01}
    merged = regmean_plus_plus(mlp, models, batches, **values)

    seen = [data_driven.gram(x) for x in batches]
    kernel = oracle(np.stack([m["fc1"]["kernel"].T for m in models]), seen, **values).T
    bias = np.mean([f64(m["fc1"]["bias"]) for m in models], axis=0)
    np.testing.assert_allclose(merged["fc1"]["kernel"], kernel, atol=1e-4)
    np.testing.assert_allclose(merged["fc1"]["bias"], bias, atol=1e-6)
    seen = [data_driven.gram(np.tanh(f64(x) @ kernel + bias)) for x in batches]
    expected = oracle(np.stack([m["fc2"]["kernel"] for m in models]), seen, **values)
    np.testing.assert_allclose(merged["fc2"]["kernel"], expected, atol=1e-3)


def test_new_models_data_and_hyperparameters_share_one_trace_and_have_gradients():
    models, batches = mlps(), [normal(i, 8, 3) for i in range(20, 23)]
    traced = chex.assert_max_traces(mlp, n=1)
    regmean_plus_plus(traced, models, batches)
    regmean_plus_plus(traced, models[::-1], batches[::-1], alpha=0.5, ridge=0.1)

    def loss(values):
        return jnp.sum(mlp(regmean_plus_plus(mlp, models, batches, **values), batches[0]) ** 2)

    values = {"weight": jnp.ones(3), "alpha": jnp.array(0.9), "ridge": jnp.array(1e-3)}
    gradients = jax.jit(jax.grad(loss))(values)
    chex.assert_tree_all_finite(gradients)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradients))


class Network(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Conv(4, (2, 2), strides=2, name="conv")(image))
        x = nn.tanh(nn.DenseGeneral((2, 3), name="split")(nn.LayerNorm(name="norm")(x)))
        return nn.DenseGeneral(2, axis=(-2, -1), name="join")(x)


def matrices(leaves, inputs):
    order = [*(axis for axis in range(leaves[0].ndim) if axis not in inputs), *inputs]
    moved = [jnp.transpose(leaf, order) for leaf in leaves]
    size = int(np.prod([leaves[0].shape[axis] for axis in inputs]))
    return jnp.stack([leaf.reshape(-1, size) for leaf in moved]), moved[0].shape, np.argsort(order)


def test_convolutions_and_heads_are_merged_in_program_order():
    model, batches = Network(), [normal(i, 3, 4, 4, 2) for i in (1, 2)]
    shapes = jax.eval_shape(model.init, jax.random.key(0), batches[0])
    models = [filled(shapes, seed) for seed in (0, 1000)]
    merged = regmean_plus_plus(model.apply, models, batches, ridge=1e-3)

    reference = jax.tree.map(lambda a, b: (a + b) / 2, *models)["params"]
    leaves = [m["params"] for m in models]
    for name in ("conv", "split", "join"):
        seen = [grams(model.apply, {"params": reference}, [batch]) for batch in batches]
        both = [seen_by[f"params/{name}/kernel"] for seen_by in seen]
        stacked, shape, back = matrices([leaf[name]["kernel"] for leaf in leaves], both[0].axes)
        out = ONE_LAYER(stacked, jnp.stack([gram.matrix for gram in both]), 1.0, 0.9, 1e-3)
        reference[name]["kernel"] = jnp.transpose(out.reshape(shape), back)
    chex.assert_trees_all_close(merged["params"], reference, atol=2e-3)


def test_layers_of_a_stack_are_merged_one_after_the_other_inside_the_scan():
    @jax.checkpoint
    def block(x, layer):
        return jnp.tanh(x @ layer["w"] + layer["b"][None]) @ layer["v"].T

    def scanned(params, x):
        return jax.lax.scan(lambda x, layer: (block(x, layer), None), x, params)[0]

    def unrolled(params, x):
        for layer in params:
            x = block(x, layer)
        return x

    models = [
        {"w": normal(i, 3, 4, 5), "b": normal(i + 9, 3, 5), "v": normal(i + 5, 3, 4, 5)}
        for i in range(2)
    ]
    layers = [[jax.tree.map(lambda leaf, i=i: leaf[i], m) for i in range(3)] for m in models]
    batches = [normal(i, 9, 4) for i in (20, 21)]
    merged = regmean_plus_plus(scanned, models, batches)
    expected = regmean_plus_plus(unrolled, layers, batches)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    chex.assert_trees_all_close(merged, expected, atol=1e-3)


def test_a_recurrent_weight_is_merged_at_the_end_on_all_turns():
    def apply_fn(params, x):
        x = x @ params["in"]
        turn = lambda h, x: (jnp.tanh(x + h @ params["h"]), None)  # noqa: E731
        return jax.lax.scan(turn, jnp.zeros((x.shape[1], 4)), x)[0]

    models = [{"in": normal(i, 3, 4), "h": normal(i + 5, 4, 4)} for i in range(2)]
    batches = [normal(i, 5, 2, 3) for i in (20, 21)]
    merged = regmean_plus_plus(apply_fn, models, batches)
    running = {"in": merged["in"], "h": (models[0]["h"] + models[1]["h"]) / 2}
    seen = [grams(apply_fn, running, [x])["h"].matrix for x in batches]
    expected = ONE_LAYER(jnp.stack([m["h"].T for m in models]), jnp.stack(seen)).T
    np.testing.assert_allclose(merged["h"], expected, atol=1e-4)


def test_tied_weights_integers_and_storage_types():
    def apply_fn(params, tokens):
        x = params["table"][tokens].astype(jnp.float32) @ params["w"].T
        return x @ params["table"].T.astype(jnp.float32), params["steps"]

    models = [
        {"table": normal(i, 7, 4).astype(jnp.bfloat16), "w": normal(i + 5, 4, 4), "steps": jnp.int32(i + 3)}
        for i in range(2)
    ]  # fmt: skip
    tokens = [jnp.array([[0, 1, 2]]), jnp.array([[4, 5, 5]])]
    merged = regmean_plus_plus(apply_fn, models, tokens)
    assert merged["steps"] == 3
    assert merged["table"].dtype == jnp.bfloat16
    chex.assert_tree_all_finite(merged)


def test_one_model_is_itself():
    model, x = {"w": normal(0, 3, 2)}, normal(1, 4, 3)
    merged = regmean_plus_plus(lambda params, x: x @ params["w"], [model], [x])
    chex.assert_trees_all_equal(merged, model)


def test_bad_input_is_named():
    models, x = mlps(), normal(0, 8, 3)
    with pytest.raises(ValueError, match="at least one model"):
        regmean_plus_plus(mlp, [], [])
    with pytest.raises(ValueError, match=r"one batch per model \(3\), found 2"):
        regmean_plus_plus(mlp, models, [x, x])
    with pytest.raises(
        ValueError, match=r"batches\[1\] has shape \[4, 3\], batches\[0\] has \[8, 3\]"
    ):
        regmean_plus_plus(mlp, models, [x, x[:4], x])
    with pytest.raises(ValueError, match=r"one number per model \(3\), found shape \[2\]"):
        regmean_plus_plus(mlp, models, [x, x, x], weight=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"models\[1\] lacks tensor 'fc2/kernel'"):
        regmean_plus_plus(mlp, [models[0], {"fc1": models[1]["fc1"]}], [x, x])
