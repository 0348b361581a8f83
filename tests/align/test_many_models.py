"""Many models in one order, restarts, descent through the projection, and heads that are split apart."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align.models import attention, draw_attention, draw_mlp, mlp

import jaxmerge as jm

X = jax.random.normal(jax.random.key(0), (32, 5))
TOKENS = jax.random.normal(jax.random.key(1), (8, 4, 3))


@pytest.fixture(scope="module")
def planted() -> tuple[Any, list[Any]]:
    one = draw_mlp(0)
    spec = jm.align.symmetry(mlp, one, X)
    models = [one]
    for i in (1, 2):
        p = jm.align.random(spec, jax.random.key(i))
        rng = np.random.default_rng(i)
        noisy = {k: w + 0.01 * rng.standard_normal(w.shape) for k, w in one.items()}
        models.append(jm.align.permute(spec, p, noisy))
    return spec, [{k: jnp.asarray(w, jnp.float32) for k, w in m.items()} for m in models]


@pytest.mark.parametrize("scheme", ["reference", "mean", "universe"])
def test_planted_models_come_into_one_order_and_cycles_to_the_identity(
    planted: Any, scheme: Any
) -> None:
    spec, models = planted
    found, info = jm.align.match_many(
        spec, models, jm.align.dual_space(0.5), scheme=scheme, x=X, apply_fn=mlp
    )
    assert info.settled
    aligned = [jm.align.permute(spec, p, m) for p, m in zip(found, models, strict=True)]
    for other in aligned[1:]:
        chex.assert_trees_all_close(aligned[0], other, atol=0.1)
    steps = [jm.align.between(spec, found, i, j) for i, j in ((0, 1), (1, 2), (2, 0))]
    around = jm.align.compose(spec, jm.align.compose(spec, steps[0], steps[1]), steps[2])
    chex.assert_trees_all_equal(
        around,
        jm.align.identity(spec.sized({k: w.shape for k, w in models[0].items()})),
    )


def test_the_best_of_many_restarts_is_no_worse_than_the_first() -> None:
    a, b = draw_mlp(1), draw_mlp(2)
    spec = jm.align.symmetry(mlp, a, X)
    one, alone = jm.align.match_restarts(spec, a, b, jm.align.weight_space(), 1)
    best, info = jm.align.match_restarts(spec, a, b, jm.align.weight_space(), 6)
    assert one["fc1"].shape == best["fc1"].shape == (12,)
    assert info.score >= alone.score


def test_descent_through_the_projection_lowers_the_loss_of_the_merged_model() -> None:
    a, b = draw_mlp(1), draw_mlp(2)
    spec = jm.align.symmetry(mlp, a, X)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((mlp(params, x) - mlp(a, x)) ** 2)

    batches = jnp.broadcast_to(X, (12, *X.shape))
    found, info = jm.align.match_ste(spec, a, b, loss, batches)
    merged = jax.tree.map(lambda p, q: (p + q) / 2, a, jm.align.permute(spec, found, b))
    np.testing.assert_allclose(loss(merged, X), info.best, rtol=1e-4)
    assert info.best == jnp.min(info.losses) < info.losses[0]


def test_split_heads_break_the_function() -> None:
    params = draw_attention(0)
    spec = jm.align.symmetry(attention, params, TOKENS)
    split = jm.align.split_trees(spec)
    assert len(split.nodes) == len(spec.nodes) + 1
    key = jax.random.key(3)
    assert jm.align.verify(spec, attention, params, TOKENS, key) < 1e-4
    assert jm.align.verify(split, attention, params, TOKENS, key, trials=4) > 1e-2
    layers = jm.align.symmetry(mlp, draw_mlp(0), X)
    assert jm.align.split_trees(layers) == layers
