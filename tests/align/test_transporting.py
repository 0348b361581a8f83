"""Optimal-transport fusion, against permutations and models whose units are copied."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from tests.align.models import (
    attention,
    draw_attention,
    draw_grouped_query_attention,
    draw_mlp,
    grouped_query_attention,
    mlp,
)

X = jnp.asarray(np.random.default_rng(0).standard_normal((64, 5)), jnp.float32)


def spaces() -> list[Any]:
    return [jm.align.weight_space(), jm.align.activation_space(), jm.align.dual_space(0.5)]


@pytest.mark.parametrize("space", spaces(), ids=["weights", "activations", "dual"])
def test_a_relabelled_model_comes_back(space: Any) -> None:
    a = draw_mlp(0)
    spec = jm.align.symmetry(mlp, a, X)
    hidden = jm.align.random(spec, jax.random.key(1))
    b = jm.align.permute(spec, hidden, a)
    moved, plans = jm.align.transport(
        spec, a, b, space, temperature=0.003, x=X, apply_fn=mlp, iterations=300
    )
    assert plans["fc1"].shape == (12, 12)
    for path in a:
        np.testing.assert_allclose(moved[path], a[path], atol=1e-3)


@pytest.mark.parametrize("space", spaces(), ids=["weights", "activations", "dual"])
def test_a_wider_model_of_copied_units_keeps_its_function(space: Any) -> None:
    a = draw_mlp(0, (5, 6, 4))
    a = {"fc1.weight": a["fc1.weight"], "fc2.weight": a["fc2.weight"]}

    def small(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ p["fc1.weight"].T) @ p["fc2.weight"].T

    order = np.random.default_rng(2).permutation(np.repeat(np.arange(6), 3))
    wide = {
        "fc1.weight": a["fc1.weight"][order],
        "fc2.weight": a["fc2.weight"][:, order] / 3,
    }
    spec = jm.align.symmetry(small, a, X)
    options = {"temperature": 0.003, "x": X, "apply_fn": small, "iterations": 300}
    narrowed, plans = jm.align.transport(spec, a, wide, space, **options)
    assert plans["fc1"].shape == (6, 18)
    np.testing.assert_allclose(small(narrowed, X), small(a, X), atol=1e-3)
    widened, _ = jm.align.transport(spec, wide, a, space, **options)
    assert widened["fc1.weight"].shape == (18, 5)
    np.testing.assert_allclose(small(widened, X), small(a, X), atol=1e-3)


def test_heads_are_brought_back_with_what_is_in_them() -> None:
    a = draw_attention(0)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((16, 4, 3)), jnp.float32)
    spec = jm.align.symmetry(attention, a, x)
    b = jm.align.permute(spec, jm.align.random(spec, jax.random.key(3)), a)
    moved, _ = jm.align.transport(
        spec,
        a,
        b,
        jm.align.activation_space(),
        temperature=0.002,
        x=x,
        apply_fn=attention,
        iterations=500,
    )
    np.testing.assert_allclose(attention(moved, x), attention(a, x), atol=1e-3)
    for path in a:
        np.testing.assert_allclose(moved[path], a[path], atol=2e-3)


def test_grouped_queries_are_brought_back_with_their_keys() -> None:
    a = draw_grouped_query_attention(0)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((16, 4, 3)), jnp.float32)
    function = grouped_query_attention
    spec = jm.align.symmetry(function, a, x)
    assert {(2, 2), (2, 4), (2, 3)} <= {spec.shape(node.name) for node in spec.free()}
    b = jm.align.permute(spec, jm.align.random(spec, jax.random.key(3)), a)
    options = {"temperature": 0.0005, "x": x, "apply_fn": function, "iterations": 1000}
    moved, _ = jm.align.transport(spec, a, b, jm.align.activation_space(), **options)
    for path in a:
        np.testing.assert_allclose(moved[path], a[path], atol=5e-3)


def test_hotter_plans_are_softer_and_keep_their_masses() -> None:
    a, b = draw_mlp(0), draw_mlp(1)
    spec = jm.align.symmetry(mlp, a, X)
    peaks = []
    for temperature in (0.01, 0.1, 10.0):
        _, plans = jm.align.transport(spec, a, b, jm.align.weight_space(), temperature=temperature)
        np.testing.assert_allclose(jnp.sum(plans["fc1"], 0), 1 / 12, rtol=1e-4)
        peaks.append(float(jnp.max(plans["fc1"])))
    assert peaks[0] > peaks[1] > peaks[2]
    np.testing.assert_allclose(plans["fc1"], 1 / 144, rtol=0.3)


def test_what_cannot_be_transported_is_said() -> None:
    a = draw_mlp(0)
    spec = jm.align.symmetry(mlp, a, X)
    with pytest.raises(ValueError, match="give x= and apply_fn="):
        jm.align.transport(spec, a, a, jm.align.dual_space())
    stacked = jm.align.PermutationSpec.from_axes(
        {"w": ("layer", None, "unit")}, sizes={"layer": 2}, parents={"unit": ["layer"]}
    )
    nodes = tuple(
        jm.align.Node(n.name, n.size, n.parents, n.name == "layer") for n in stacked.nodes
    )
    fixed = jm.align.PermutationSpec(nodes, stacked.leaves)
    w = {"w": jnp.ones((2, 3, 4))}
    with pytest.raises(ValueError, match="'unit' stands in stacked layers"):
        jm.align.transport(fixed, w, w, jm.align.weight_space())
