"""Linear merges evaluated in factored form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.models.cct import CCT, CCTConfig
from jaxmerge.search.factored import factored


def mlp(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(jnp.take(params["table"], x, axis=0) @ params["first"] + params["bias"][None])
    # Tied: the table is looked up and multiplied with.
    return hidden @ params["table"].T


def stacked(params: Any, x: jax.Array) -> jax.Array:
    def layer(h: jax.Array, one: Any) -> tuple[jax.Array, None]:
        return h + jnp.tanh(one["scale"][None] * h @ one["w"]), None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["out"]


def twice(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["w"] + jnp.sum(params["v"] @ params["v"])


def draw(shapes: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


CASES: dict[str, tuple[Any, Any, Any, set[str]]] = {
    "tied table": (
        mlp,
        {"table": (7, 4), "first": (4, 4), "bias": (4,)},
        jnp.array([0, 3, 6]),
        {"first"},
    ),
    "stacked layers": (
        stacked,
        {"layers": {"w": (3, 5, 5), "scale": (3, 5)}, "out": (5, 2)},
        jnp.linspace(-1, 1, 20).reshape(4, 5),
        {"layers/w", "out"},
    ),
    "used twice": (
        twice,
        {"w": (4, 4), "v": (3, 3)},
        jnp.linspace(-1, 1, 8).reshape(2, 4),
        {"w"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_merged_model_computes(case: str) -> None:
    apply_fn, shapes, x, wanted = CASES[case]
    base, a, b = (draw(shapes, seed) for seed in range(3))
    run, kept = factored(apply_fn, [a, b], base, x)
    assert set(kept) == wanted
    coefficients = jnp.array([[0.3, 0.9], [0.0, 0.0], [-0.5, 1.0]])
    found = jax.jit(jax.vmap(run, (0, None)))(coefficients, x)
    for row, weights in zip(found, coefficients, strict=True):
        merged = jm.merge("task_arithmetic", [a, b], base=base, weight=weights, normalize=False)
        np.testing.assert_allclose(row, apply_fn(merged, x), rtol=2e-5, atol=2e-6)


def test_a_network_with_convolutions_and_attention() -> None:
    model = CCT(CCTConfig((8, 8), (4, 8), layers=1, heads=2, hidden=16, classes=3, channels=1))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    base = model.init(jax.random.key(1), x)
    tuned = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), base
    )
    run, kept = factored(model.apply, [tuned], base, x)
    assert sum(path.endswith("kernel") for path in kept) >= 4
    merged = jm.merge("task_arithmetic", [tuned], base=base, weight=0.7, normalize=False)
    np.testing.assert_allclose(
        jax.jit(run)(jnp.array([0.7]), x), model.apply(merged, x), rtol=2e-5, atol=2e-6
    )


def test_no_merged_copy_of_a_matrix_is_made() -> None:
    apply_fn, shapes, x, _ = CASES["stacked layers"]
    base, a = (draw(shapes, seed) for seed in range(2))
    run, _ = factored(apply_fn, [a], base, x)
    program = jax.make_jaxpr(jax.vmap(run, (0, None)))(jnp.ones((64, 1)), x)
    shapes_made = [out.aval.shape for eqn in _equations(program.jaxpr) for out in eqn.outvars]
    assert not any(shape[:1] == (64,) and shape[-2:] == (5, 5) for shape in shapes_made)


def _equations(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
