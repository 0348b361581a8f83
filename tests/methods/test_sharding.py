"""Sharded models: each tensor is merged where it lies."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmerge as jm

SPECS = {"attn": {"q": P(None, "model")}, "mlp": {"up": P("data", "model"), "bias": P("model")}}
SHAPES = {"attn": {"q": (16, 32)}, "mlp": {"up": (32, 64), "bias": (64,)}}


def model(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties"])
def test_a_merge_stays_where_its_models_are(name: str) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, SPECS
        )

    method = jm.methods.get(name)()
    base = None if method.base == "unused" else model(0)
    key = jax.random.key(0) if method.random else None
    models = [model(1), model(2)]
    merged = jm.merge(method, models, base=base, key=key)
    sharded = jm.merge(
        method,
        [place(one) for one in models],
        base=None if base is None else place(base),
        key=key,
    )
    placed = place(models[0])
    for found, expected in zip(jax.tree.leaves(sharded), jax.tree.leaves(placed), strict=True):
        assert found.sharding.is_equivalent_to(expected.sharding, found.ndim)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), merged, sharded
    )
