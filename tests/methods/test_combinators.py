"""A method per block, a traced choice, values per block, and populations of them."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.methods import engine

METHODS = jm.methods


def trees(count: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "attn": {"q": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)},
            "mlp": {"up": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)},
            "layers": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
        }
        for _ in range(count)
    ]


def test_by_block_equals_the_methods_on_their_blocks() -> None:
    base, *models = trees()
    labels = {"attn/*": "attention", "mlp/*": "mlp", "**": "rest"}
    ties, arithmetic = METHODS.ties(scope="tensor"), METHODS.task_arithmetic()
    method = METHODS.by_block(
        {"attention": ties, "mlp": METHODS.dare_ties(), "rest": arithmetic}, labels
    )
    key = jax.random.key(1)
    hyperparams = {"attention": {"density": 0.5}, "mlp": {"density": 0.4}, "rest": {"scale": 0.3}}
    merged = jm.merge(method, models, base=base, key=key, **hyperparams)
    alone = {
        "attn": jm.merge(ties, models, base=base, density=0.5),
        "mlp": jm.merge("dare_ties", models, base=base, density=0.4, key=key),
        "layers": jm.merge(arithmetic, models, base=base, scale=0.3),
    }
    for block, whole in alone.items():
        chex.assert_trees_all_close(merged[block], whole[block], rtol=1e-6)
    assert method is METHODS.by_block(
        {"attention": ties, "mlp": METHODS.dare_ties(), "rest": arithmetic}, labels
    )


def test_by_block_splits_the_layers_of_a_stacked_leaf() -> None:
    base, *models = trees()
    layout = jm.tree.stacked_layout(base, {"layers": "layers/{layer}"})
    method = METHODS.by_block(
        {"odd": METHODS.task_arithmetic(), "even": METHODS.ties(scope="tensor")},
        {"layers/1": "odd", "**": "even"},
    )
    hyperparams = {"odd": {"scale": 0.5}, "even": {"density": 0.5}}
    merged = jm.merge(method, models, base=base, layout=layout, **hyperparams)["layers"]
    odd = jm.merge("task_arithmetic", models, base=base, scale=0.5)["layers"]
    ties = METHODS.ties(scope="tensor")
    even = jm.merge(ties, models, base=base, layout=layout, density=0.5)["layers"]
    np.testing.assert_allclose(merged[1], odd[1], rtol=1e-6)
    np.testing.assert_allclose(merged[jnp.array([0, 2])], even[jnp.array([0, 2])], rtol=1e-6)


def test_by_block_refuses_labels_and_methods_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="no method for block 'b'"):
        METHODS.by_block({"a": METHODS.linear()}, {"x": "a", "**": "b"})
    with pytest.raises(ValueError, match="no label for block 'b'"):
        METHODS.by_block({"a": METHODS.linear(), "b": METHODS.linear()}, {"**": "a"})
    method = METHODS.by_block({"a": METHODS.linear()}, {"**": "a"})
    with pytest.raises(ValueError, match="no block 'c'"):
        jm.merge(method, trees(2), c={})


def test_per_block_values_reach_their_blocks() -> None:
    base, *models = trees()
    labels = {"attn/*": "attention", "**": "rest"}
    scale = jm.tree.per_block({"attention": 0.25, "rest": 2.0}, labels)
    weight = jm.tree.per_block([[1.0, 0.0], [0.5, 0.5]], labels)
    method = METHODS.task_arithmetic()
    for apply in (
        lambda: jm.merge(method, models, base=base, scale=scale, weight=weight),
        lambda: method.apply(method.init(models, base), {"scale": scale, "weight": weight}),
    ):
        merged = apply()
        delta = [jax.tree.map(jnp.subtract, model, base) for model in models]
        np.testing.assert_allclose(
            merged["attn"]["q"], base["attn"]["q"] + 0.25 * delta[0]["attn"]["q"], rtol=1e-5
        )
        expected = base["mlp"]["up"] + delta[0]["mlp"]["up"] + delta[1]["mlp"]["up"]
        np.testing.assert_allclose(merged["mlp"]["up"], expected, rtol=1e-5)


def test_a_population_of_per_block_values_compiles_once() -> None:
    base, *models = trees()
    method = METHODS.ties(scope="tensor")
    state = method.init(models, base)
    block = jm.tree.per_block(jnp.full(2, 0.5), {"attn/*": "attention", "**": "rest"})

    @jax.jit
    @chex.assert_max_traces(n=1)
    def population(values: jax.Array) -> Any:
        def one(row: jax.Array) -> Any:
            return method.apply(
                state, {"density": jm.tree.PerBlock(row, block.rules, block.blocks)}
            )

        return jax.vmap(one)(values)

    values = jnp.linspace(0.1, 1.0, 8).reshape(4, 2)
    many = population(values)
    population(values * 0.5)
    for i in range(4):
        one = jm.tree.PerBlock(values[i], block.rules, block.blocks)
        chex.assert_trees_all_close(
            jm.tree.unstack(many)[i], method.apply(state, {"density": one}), rtol=1e-5
        )


def test_choose_equals_each_of_its_methods() -> None:
    base, *models = trees()
    key = jax.random.key(2)
    several = [
        METHODS.linear(),
        METHODS.task_arithmetic(),
        METHODS.ties(scope="tensor"),
        METHODS.dare_linear(),
        METHODS.dare_ties(rescale_norm="l1"),
    ]
    method = METHODS.choose(several)
    state = method.init(models, base)
    hyperparams = {"ties": {"density": 0.4}, "dare_linear": {"weight": [0.2, 0.9]}}
    run = jax.jit(lambda i: method.apply(state, {"method": i, **hyperparams}, key))
    for i, one in enumerate(several):
        own = hyperparams.get(one.name, {})
        expected = jm.merge(one, models, base=base, key=key, **own)
        chex.assert_trees_all_close(run(i), expected, rtol=1e-5, atol=1e-6)
        eager = jm.merge(method, models, base=base, key=key, method=i, **hyperparams)
        chex.assert_trees_all_close(eager, expected, rtol=1e-5, atol=1e-6)


def test_choose_puts_interpolation_beside_task_vectors() -> None:
    base, model = trees(2)
    method = METHODS.choose([METHODS.ties(), METHODS.slerp()])
    state = method.init([model], base)
    merged = method.apply(state, {"method": 1, "slerp": {"t": 0.3}})
    expected = jm.merge("slerp", [model], base=base, t=0.3)
    chex.assert_trees_all_close(merged, expected, rtol=1e-5)


def test_choose_refuses_what_it_cannot_choose_between() -> None:
    with pytest.raises(ValueError, match="at least one"):
        METHODS.choose([])
    with pytest.raises(ValueError, match="'ties' twice"):
        METHODS.choose([METHODS.ties(), METHODS.ties(scope="tensor")])
    with pytest.raises(TypeError, match="built from a leaf method"):
        METHODS.choose({"blocks": METHODS.by_block({"a": METHODS.linear()}, {"**": "a"})})
    both = METHODS.choose({"paper": METHODS.ties(), "tensor": METHODS.ties(scope="tensor")})
    assert list(both.hyperparams) == ["method", "paper", "tensor"]


def test_a_sweep_of_256_candidates_compiles_once_and_equals_256_merges() -> None:
    base, *models = trees()
    for scope in ("model", "tensor"):
        method = METHODS.ties(scope=scope)
        state = method.init(models, base)
        keys = jax.random.split(jax.random.key(0), 2)
        density = jax.random.uniform(keys[0], (256, 2))
        weight = jax.random.uniform(keys[1], (256, 2), minval=-0.5, maxval=1.5)

        @jax.jit
        @chex.assert_max_traces(n=1)
        def sweep(
            density: jax.Array, weight: jax.Array, method: Any = method, state: Any = state
        ) -> Any:
            def one(d: jax.Array, w: jax.Array) -> Any:
                return method.apply(state, {"density": d, "weight": w})

            return jax.vmap(one)(density, weight)

        swept = jm.tree.unstack(sweep(density, weight))
        for i in range(256):
            alone = jm.merge(method, models, base=base, density=density[i], weight=weight[i])
            chex.assert_trees_all_close(swept[i], alone, rtol=1e-5, atol=1e-6)
        chex.clear_trace_counter()


LARGE = (512, 512)


@pytest.mark.parametrize("name", ["ties", "emr"])
def test_large_tensors_are_computed_one_by_one_with_the_same_result(name: str) -> None:
    """Single tensors and stacked layers of one large shape, in one batch, with values per block."""
    assert np.prod(LARGE) >= engine.LARGE
    keys = jax.random.split(jax.random.key(4), 3)
    base, *models = (
        {"layers": jax.random.normal(key, (2, *LARGE)), "a": jax.random.normal(key, LARGE) + 1}
        for key in keys
    )
    layout = jm.tree.stacked_layout(base, {"layers": "layers.{layer}"})
    scale = jm.tree.per_block([0.5, 2.0], {"a": "first", "**": "rest"})
    method = jm.methods.get(name)(**({"scope": "tensor"} if name == "ties" else {}))
    state = method.init(models, base, layout=layout)
    assert len(state.batches) == 1
    together = jax.jit(method.apply)(state, {"scale": scale})
    apart = jm.merge(method, models, base=base, layout=layout, scale=scale)
    chex.assert_trees_all_close(together, apart, rtol=1e-6, atol=1e-6)
