"""Walking through a traced program: results stay, sites are found, replacements last."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.tracing import Site, Use, Visit, interpret, sites


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def keep_all(site: Site, use: Use) -> Visit:
    return Visit(record=use.inputs)


def found(apply_fn, params, x):
    return [(site.path, site.inputs, site.outputs) for site in sites(apply_fn, params, x)]


LAYERS = {
    "product": (lambda w, x: x @ w, (3, 4), (2, 3), (0,)),
    "transposed": (lambda w, x: x @ w.T, (4, 3), (2, 3), (1,)),
    "from_the_left": (lambda w, x: w @ x, (4, 3), (3, 2), (1,)),
    "vector": (lambda w, x: x @ w, (3,), (2, 3), (0,)),
    "single_example": (lambda w, x: x @ w, (3, 4), (3,), (0,)),
    "positions": (lambda w, x: jnp.einsum("btd,dhe->bhte", x, w), (3, 2, 4), (2, 5, 3), (0,)),
    "heads": (lambda w, x: jnp.einsum("bhte,hed->btd", x, w), (2, 4, 3), (2, 2, 5, 4), (0, 1)),
    "heads_swapped": (lambda w, x: jnp.einsum("teh,hed->td", x, w), (2, 4, 3), (5, 4, 2), (0, 1)),
    "reshaped": (lambda w, x: jnp.einsum("the,hed->td", x, w.reshape(2, 4, 3)), (8, 3), (5, 2, 4), (0,)),
    "swapped_pieces": (
        lambda w, x: jnp.einsum("teh,hed->td", x, w.reshape(2, 4, 3)), (8, 3), (5, 4, 2), (0,),
    ),
    "joined": (lambda w, x: x @ w.reshape(8, 3), (2, 4, 3), (5, 8), (0, 1)),
    "cast": (lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), (3, 4), (2, 3), (0,)),
    "expanded": (lambda w, x: x @ w[None, :, :, None][0, :, :, 0], (3, 4), (2, 3), (0,)),
    "sliced_outputs": (lambda w, x: x @ w[:, 1:3], (3, 4), (2, 3), (0,)),
    "convolution": (
        lambda w, x: jax.lax.conv_general_dilated(
            x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), rhs_dilation=(1, 2)
        ),
        (3, 2, 2, 5), (2, 7, 6, 2), (0, 1, 2),
    ),
    "channels_first": (
        lambda w, x: jax.lax.conv_general_dilated(x, w, (1, 2), ((1, 0), (2, 1))),
        (5, 2, 3, 2), (2, 2, 6, 7), (1, 2, 3),
    ),
    "transposed_convolution": (
        lambda w, x: jax.lax.conv_transpose(x, w, (2,), "SAME"), (3, 2, 4), (2, 5, 2), (0, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_flattened_inputs_times_flattened_parameter_give_the_output(name):
    layer, shape, inputs, axes = LAYERS[name]
    params, x = {"w": normal(0, *shape)}, normal(1, *inputs)
    tolerance = 0.05 if name == "cast" else 1e-4

    def apply_fn(params, x):
        return layer(params["w"], x)

    def visit(site: Site, use: Use) -> Visit:
        matrix = use.parameter.transpose((*site.outputs, *site.inputs))
        matrix = matrix.reshape((-1, use.inputs.shape[1]))
        product = jnp.matmul(use.inputs, matrix.T, precision="highest")
        if not site.whole:
            product = product[:, 1:3]
        return Visit(
            output=lambda y: jnp.where(
                jnp.max(jnp.abs(use.rows(y) - product)) < tolerance, y, jnp.nan
            )
        )

    @jax.jit
    def run(params, x):
        return interpret(apply_fn, params, x, visit).outputs, apply_fn(params, x)

    np.testing.assert_array_equal(*run(params, x))
    (site,) = sites(apply_fn, params, x)
    assert site.inputs == axes
    assert site.shape == shape
    assert sorted(site.inputs + site.outputs) == list(range(len(shape)))
    assert site.whole == (name != "sliced_outputs")


NO_SITES = {
    "lookup": lambda p, x: p["w"][jnp.zeros(3, int)] + x,
    "elementwise": lambda p, x: x * p["w"],
    "two_parameters": lambda p, x: x + p["w"] @ p["v"],
    "part_of_an_input_axis": lambda p, x: x[:, :2] @ p["w"][1:],
    "scaled": lambda p, x: x @ (2 * p["w"]),
    "joined": lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1),
    "reversed": lambda p, x: x @ p["w"][::-1],
    "outer_product": lambda p, x: x[:, :1] @ p["w"][0][None],
    "branches": lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x @ p["v"]),
    "open_ended_loop": lambda p, x: jax.lax.while_loop(
        lambda s: jnp.max(s) > 9, lambda s: s @ p["w"], x
    ),
    "per_group": lambda p, x: jnp.einsum("gi,gio->go", x, p["w"][:, :, None]),
}


@pytest.mark.parametrize("name", NO_SITES)
def test_what_is_no_linear_use_of_one_leaf_is_no_site_and_is_computed_as_it_is(name):
    params = {"w": normal(0, 3, 3), "v": normal(1, 3, 3)}
    x = normal(2, 3, 3)
    assert sites(NO_SITES[name], params, x) == []
    run = jax.jit(
        lambda p, x: (interpret(NO_SITES[name], p, x, keep_all).outputs, NO_SITES[name](p, x))
    )
    walked, expected = run(params, x)
    np.testing.assert_array_equal(walked, expected)


def test_depthwise_convolution_is_no_site():
    model = nn.Conv(4, (3,), feature_group_count=4)
    x = normal(0, 2, 5, 4)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    assert sites(model.apply, params, x) == []


def test_sites_inside_called_functions_are_found_in_program_order():
    @jax.custom_jvp
    def custom(w, x):
        return x @ w

    custom.defjvp(lambda primals, tangents: (custom(*primals), custom(*primals)))

    @jax.custom_vjp
    def straight(w, x):
        return x @ w

    straight.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: saved)

    def apply_fn(params, x):
        x = jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w.T))(params["z"], x)
        x = jax.checkpoint(lambda x: jnp.tanh(x @ params["y"]))(x)
        x = custom(params["x"], x)
        return {"out": straight(params["w"], x), "same": params["w"]}

    params, x = {name: normal(i, 3, 3) for i, name in enumerate("wxyz")}, normal(9, 2, 3)
    assert found(apply_fn, params, x) == [
        ("z", (1,), (0,)),
        ("y", (0,), (1,)),
        ("x", (0,), (1,)),
        ("w", (0,), (1,)),
    ]
    chex.assert_trees_all_close(
        jax.jit(lambda p, x: interpret(apply_fn, p, x, keep_all).outputs)(params, x),
        jax.jit(apply_fn)(params, x),
        atol=1e-6,
    )


class Network(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 8, name="embed")
        x = nn.LayerNorm()(embed(tokens))
        x = x + nn.MultiHeadDotProductAttention(2, name="attn")(x, x)
        x = nn.remat(nn.Dense)(8, dtype=jnp.bfloat16, name="up")(nn.gelu(x))
        return embed.attend(x.astype(jnp.float32))


def test_a_flax_model_has_its_sites_and_an_unchanged_result():
    tokens = jnp.array([[1, 2, 3], [4, 5, 6]])
    shapes = jax.eval_shape(Network().init, jax.random.key(0), tokens)
    params = jax.tree.map(lambda leaf: normal(leaf.size, *leaf.shape), shapes)
    assert found(Network().apply, params, tokens) == [
        ("params/attn/query/kernel", (0,), (1, 2)),
        ("params/attn/key/kernel", (0,), (1, 2)),
        ("params/attn/value/kernel", (0,), (1, 2)),
        ("params/attn/out/kernel", (0, 1), (2,)),
        ("params/up/kernel", (0,), (1,)),
        ("params/embed/embedding", (1,), (0,)),
    ]
    run = jax.jit(
        lambda p, x: (
            interpret(Network().apply, p, x, keep_all).outputs,
            Network().apply(p, x),
        )
    )
    np.testing.assert_array_equal(*run(params, tokens))


def test_gradients_keep_the_rules_of_functions_of_activations():
    @jax.custom_vjp
    def through(x):
        return jnp.round(x)

    through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
    params, x = {"w": normal(0, 3, 2)}, normal(1, 4, 3)

    def apply_fn(params, x):
        return jnp.sum(through(jax.nn.relu(x @ params["w"])))

    gradient = jax.jit(jax.grad(lambda p: interpret(apply_fn, p, x, keep_all).outputs))
    chex.assert_trees_all_close(gradient(params), jax.jit(jax.grad(apply_fn))(params, x))


STACKS = {
    "scan": lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0],
    "scan_of_a_cast": lambda p, x: jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w["k"].T), x), x, {"k": p["w"].astype(jnp.float32).copy()}
    )[0],
    "reversed_scan": lambda p, x: jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w), None), x, p["w"], reverse=True
    )[0],
    "by_index": lambda p, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ p["w"][0]) @ p["w"][1]) @ p["w"][-1]),
    "fori_loop": lambda p, x: jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacked_layers_are_seen_one_by_one(name):
    params, x = {"w": normal(0, 3, 4, 4)}, normal(1, 2, 4)
    apply_fn = STACKS[name]
    assert {(site.path, site.layers, site.shape) for site in sites(apply_fn, params, x)} == {
        ("w", 3, (4, 4))
    }
    run = jax.jit(
        lambda p, x: (
            interpret(apply_fn, p, x, keep_all).outputs,
            [(r.layer, r.value) for r in interpret(apply_fn, p, x, keep_all).records],
        )
    )
    walked, records = run(params, x)
    np.testing.assert_allclose(walked, jax.jit(apply_fn)(params, x), atol=1e-6)
    layers = np.concatenate([np.reshape(layer, -1) for layer, _ in records])
    inputs = np.concatenate([np.reshape(value, (-1, 2, 4)) for _, value in records])
    assert sorted(layers) == [0, 1, 2]
    order = [2, 1, 0] if name == "reversed_scan" else [0, 1, 2]
    x = np.asarray(x, np.float64)
    for layer in order:
        np.testing.assert_allclose(inputs[list(layers).index(layer)], x, atol=1e-5)
        w = np.asarray(params["w"][layer], np.float64)
        x = np.tanh(x @ (w.T if name == "scan_of_a_cast" else w))


@pytest.mark.parametrize("name", ["scan", "reversed_scan", "by_index"])
def test_replaced_layers_are_used_and_returned(name):
    params, x = {"w": normal(0, 3, 4, 4)}, normal(1, 2, 4)

    def visit(site: Site, use: Use) -> Visit:
        return Visit(parameter=use.parameter * (1.0 + use.layer))

    run = jax.jit(lambda p, x: interpret(STACKS[name], p, x, visit)[:2])
    outputs, replaced = run(params, x)
    scaled = {"w": params["w"] * jnp.arange(1.0, 4.0)[:, None, None]}
    np.testing.assert_allclose(replaced["w"], scaled["w"], rtol=1e-6)
    np.testing.assert_allclose(outputs, STACKS[name](scaled, x), atol=1e-5)


def test_a_replacement_reaches_every_later_use_in_the_leafs_dtype():
    def apply_fn(params, x):
        w = params["w"].astype(jnp.float32)
        turned = w.T
        return (x @ w) @ turned, params["w"]

    params, x = {"w": normal(0, 3, 3).astype(jnp.bfloat16)}, normal(1, 2, 3)

    def visit(site: Site, use: Use) -> Visit:
        return (
            Visit(record=())
            if use.replaced
            else Visit(parameter=2 * use.parameter.astype(jnp.float32))
        )

    walked = interpret(apply_fn, params, x, visit)
    chex.assert_trees_all_equal(walked.outputs, apply_fn({"w": 2 * params["w"]}, x))
    chex.assert_trees_all_equal(walked.params, {"w": 2 * params["w"]})
    assert walked.params["w"].dtype == jnp.bfloat16
    assert [record.site.inputs for record in walked.records] == [(1,)]


def test_what_a_loop_uses_in_every_turn_is_marked_and_recorded_for_each():
    def apply_fn(params, x):
        return jax.lax.scan(
            lambda h, x: (jnp.tanh(h @ params["h"] + x @ params["x"]), h), jnp.zeros((2, 4)), x
        )

    params, x = {"h": normal(0, 4, 4), "x": normal(1, 3, 4)}, normal(2, 5, 2, 3)
    double = jax.jit(
        lambda p, x: interpret(
            apply_fn, p, x, lambda s, u: Visit(u.inputs, parameter=2 * u.parameter)
        )[:2]
    )
    outputs, replaced = double(params, x)
    chex.assert_trees_all_equal(replaced, params)
    chex.assert_trees_all_close(
        outputs, apply_fn(jax.tree.map(lambda w: 2 * w, params), x), atol=1e-5
    )
    assert [(site.path, site.repeated) for site in sites(apply_fn, params, x)] == [
        ("h", True),
        ("x", True),
    ]
    records = jax.jit(lambda p, x: [r.value for r in interpret(apply_fn, p, x, keep_all).records])(
        params, x
    )
    assert [record.shape for record in records] == [(5, 2, 4), (5, 2, 3)]
