"""Matching: planted permutations are found, in every space, by one program."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align.models import (
    attention,
    draw_attention,
    draw_grouped_query_attention,
    draw_mlp,
    grouped_query_attention,
    mlp,
)
from scipy.optimize import linear_sum_assignment

import jaxmerge as jm
from jaxmerge.align import matching

X = jax.random.normal(jax.random.key(0), (64, 5))
TOKENS = jax.random.normal(jax.random.key(1), (16, 4, 3))
SPACES = {
    "weights": jm.align.weight_space(),
    "products": jm.align.weight_space("product"),
    "activations": jm.align.activation_space(),
    "both": jm.align.dual_space(0.5),
}


def planted(function: Any, a: Any, x: jax.Array, seed: int) -> tuple[Any, Any, Any]:
    """A spec, a permuted and slightly changed copy of a model, and what undoes the permutation."""
    spec = jm.align.symmetry(function, a, x)
    p = jm.align.random(spec, jax.random.key(seed))
    b = jm.align.permute(spec, p, a)
    leaves, tree = jax.tree.flatten(b)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + 0.01 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)
    ]
    return spec, jax.tree.unflatten(tree, noisy), jm.align.inverse(spec, p)


@pytest.mark.parametrize("space", SPACES)
def test_planted_permutations_of_layers_are_found(space: str) -> None:
    a = draw_mlp(0)
    spec, b, answer = planted(mlp, a, X, 3)
    found, info = jm.align.match(spec, a, b, SPACES[space], x=X, apply_fn=mlp)
    chex.assert_trees_all_equal(found, answer)
    assert info.score > 0.9 or space == "products"


@pytest.mark.parametrize("space", SPACES)
def test_planted_permutations_of_heads_and_of_what_is_in_them_are_found(space: str) -> None:
    a = draw_attention(0)
    spec, b, answer = planted(attention, a, TOKENS, 5)
    found, _ = jm.align.match(spec, a, b, SPACES[space], x=TOKENS, apply_fn=attention)
    chex.assert_trees_all_equal(found, answer)


def test_grouped_queries_are_matched_again_once_what_reads_them_with_values_has_moved() -> None:
    a = draw_grouped_query_attention(0)
    spec = jm.align.symmetry(grouped_query_attention, a, TOKENS)
    b = jm.align.permute(spec, jm.align.random(spec, jax.random.key(3)), a)
    found, info = jm.align.match(spec, a, b, jm.align.weight_space())
    chex.assert_trees_all_equal(jm.align.permute(spec, found, b), a)
    assert info.score > 0.9999


def test_experts_and_scanned_layers_are_matched_each_for_themselves() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        def layer(h: jax.Array, w: Any) -> Any:
            return h + jnp.tanh(h @ w["up"]) @ w["down"], None

        h, _ = jax.lax.scan(layer, x @ p["in"], p["layers"])
        gate = jax.nn.softmax(h @ p["router"], -1)
        u = jnp.tanh(jnp.einsum("bd,edf->bef", h, p["experts"]["up"]))
        return jnp.einsum("be,bef,efd->bd", gate, u, p["experts"]["down"])

    keys = jax.random.split(jax.random.key(0), 6)
    a = {
        "in": jax.random.normal(keys[0], (5, 6)),
        "layers": {
            "up": jax.random.normal(keys[1], (3, 6, 7)),
            "down": 0.3 * jax.random.normal(keys[2], (3, 7, 6)),
        },
        "router": jax.random.normal(keys[3], (6, 4)),
        "experts": {
            "up": jax.random.normal(keys[4], (4, 6, 5)),
            "down": jax.random.normal(keys[5], (4, 5, 2)),
        },
    }
    spec, b, answer = planted(function, a, X, 7)
    shapes = sorted(p.shape for p in answer.values())
    assert shapes == [(3, 7), (4,), (4, 5), (6,)]
    for space in ("activations", "both"):
        found, _ = jm.align.match(spec, a, b, SPACES[space], x=X, apply_fn=function)
        chex.assert_trees_all_equal(found, answer)
    # By weights alone the descent may stop elsewhere, but it stays where it belongs.
    found, info = jm.align.match(spec, a, b, SPACES["weights"], start=answer)
    chex.assert_trees_all_equal(found, answer)
    assert info.sweeps == 1


def oracle(a: Any, b: Any, alpha: float, order: list[str], sweeps: int) -> dict[str, np.ndarray]:
    """MuDSC's descent for the MLP, plainly, in float64."""
    w = [np.asarray(a[f"fc{i}.weight"], np.float64) for i in range(1, 5)]
    v = [np.asarray(b[f"fc{i}.weight"], np.float64) for i in range(1, 5)]

    def hidden(weights: list[np.ndarray]) -> list[np.ndarray]:
        h, found = np.asarray(X, np.float64), []
        for one in weights[:-1]:
            h = np.maximum(h @ one.T, 0)
            found.append(h)
        return found

    def correlate(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        one, other = (m - m.mean(1, keepdims=True) for m in (one, other))
        norms = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1)[None]
        return one @ other.T / np.maximum(norms, 1e-7)

    data = [correlate(h.T, k.T) for h, k in zip(hidden(w), hidden(v), strict=True)]
    perms = [linear_sum_assignment(s, maximize=True)[1] for s in data]
    for _ in range(sweeps):
        for name in order:
            g = int(name[2]) - 1
            before = v[g] if g == 0 else v[g][:, perms[g - 1]]
            after = v[g + 1] if g == 2 else v[g + 1][perms[g + 1]]
            rows_a = np.concatenate([w[g], w[g + 1].T], 1)
            rows_b = np.concatenate([before, after.T], 1)
            s = alpha * correlate(rows_a, rows_b) + (1 - alpha) * data[g]
            perms[g] = linear_sum_assignment(s, maximize=True)[1]
    return {f"fc{i + 1}": p for i, p in enumerate(perms)}


@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_the_descent_is_that_of_the_paper_on_unrelated_models(alpha: float) -> None:
    a, b = draw_mlp(1), draw_mlp(2)
    order = ["fc2", "fc3", "fc1"]
    spec = jm.align.symmetry(mlp, a, X)
    found, info = jm.align.match(
        spec, a, b, jm.align.dual_space(alpha), x=X, apply_fn=mlp, order=[order]
    )
    assert info.settled
    expected = oracle(a, b, alpha, order, int(info.sweeps))
    for name, p in expected.items():
        assert found[name].tolist() == p.tolist()


def test_batches_give_what_one_batch_gives() -> None:
    a, b = draw_mlp(1), draw_mlp(2)
    spec = jm.align.symmetry(mlp, a, X)
    whole = jm.align.activation_similarity(spec, mlp, a, b, [X])
    parts = jm.align.activation_similarity(spec, mlp, a, b, [X[:20], X[20:40], X[40:]])
    chex.assert_trees_all_close(whole, parts, atol=1e-5)


def test_many_alphas_share_a_program() -> None:
    a, b = draw_mlp(1), draw_mlp(2)
    spec = jm.align.symmetry(mlp, a, X)
    data = jm.align.activation_similarity(spec, mlp, a, b, [X])
    jm.align.match(spec, a, b, jm.align.dual_space(0.1), similarities=data)
    programs = matching._descend._cache_size()
    for alpha in (0.5, 0.9):
        jm.align.match(spec, a, b, jm.align.dual_space(alpha), similarities=data)
    assert matching._descend._cache_size() == programs
    path, info = jm.align.match_path(spec, a, b, [0.1, 0.5, 0.9], similarities=data)
    assert path["fc1"].shape == (3, 12)
    assert jnp.all(info.settled)
    one, alone = jm.align.match(spec, a, b, jm.align.dual_space(0.1), similarities=data)
    assert path["fc1"][0].tolist() == one["fc1"].tolist()
    np.testing.assert_allclose(info.score[0], alone.score, rtol=1e-6)


def test_alpha_may_differ_from_node_to_node() -> None:
    a, b = draw_mlp(1), draw_mlp(2)
    spec = jm.align.symmetry(mlp, a, X)
    same = {"fc1": 0.3, "fc2": 0.3, "fc3": 0.3}
    one, _ = jm.align.match(spec, a, b, jm.align.dual_space(0.3), x=X, apply_fn=mlp)
    each, _ = jm.align.match(spec, a, b, jm.align.dual_space(same), x=X, apply_fn=mlp)
    chex.assert_trees_all_equal(one, each)
    with pytest.raises(ValueError, match="alpha has no value for node 'fc3'"):
        jm.align.match(spec, a, b, jm.align.dual_space({"fc1": 0.3, "fc2": 0.1}), x=X, apply_fn=mlp)


def test_dead_units_are_matched_with_each_other() -> None:
    a = draw_mlp(0)
    a = {
        **a,
        "fc1.weight": a["fc1.weight"].at[:6].set(0),
        "fc2.weight": a["fc2.weight"].at[:, :6].set(0),
    }
    spec, b, _ = planted(mlp, a, X, 3)
    found, info = jm.align.match(spec, a, b, jm.align.dual_space(0.5), x=X, apply_fn=mlp)
    aligned = jm.align.permute(spec, found, b)
    assert jnp.isfinite(info.score)
    gap = jnp.abs(aligned["fc1.weight"] - a["fc1.weight"])
    assert jnp.max(gap) < 0.1


def test_what_is_missing_or_broken_is_said() -> None:
    a = draw_mlp(0)
    spec = jm.align.symmetry(mlp, a, X)
    with pytest.raises(ValueError, match="give x= and apply_fn="):
        jm.align.match(spec, a, a, jm.align.dual_space())
    with pytest.raises(ValueError, match="no tree has the root 'fc9'"):
        jm.align.match(spec, a, a, jm.align.weight_space(), order=[["fc9", "fc1", "fc2"]])
    with pytest.raises(ValueError, match="expected every one of"):
        jm.align.match(spec, a, a, jm.align.weight_space(), order=[["fc1", "fc1", "fc2"]])
    broken = {**a, "fc2.weight": a["fc2.weight"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"the similarity of node 'fc\d' is not finite"):
        jm.align.match(spec, a, broken, jm.align.weight_space())
    with pytest.raises(ValueError, match=r"axis 0 of 'fc1.weight' has 12 indices in the spec, 13"):
        jm.align.match(spec, a, draw_mlp(0, (5, 13, 12, 12, 4)), jm.align.weight_space())


def test_all_units_have_activations_beside_a_class_token() -> None:
    config = jm.models.ViTConfig((4, 4), (2, 2), 6, 1, 2, 8, num_labels=3)
    model = jm.models.ViT(config)
    images = jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    a, b = (model.init(jax.random.key(i), images) for i in (1, 2))
    spec = jm.align.symmetry(model.apply, a, images)
    found = jm.align.activation_similarity(spec, model.apply, a, b, [images])
    heads = {parent for node in spec.free() for parent in node.parents}
    assert heads
    assert set(found) == {node.name for node in spec.free()} - heads


def test_a_model_is_traced_once_for_all_activations_of_its_kind() -> None:
    calls = []

    def function(params: Any, x: jax.Array) -> jax.Array:
        calls.append(x.shape)
        return mlp(params, x)

    a, b = draw_mlp(0), draw_mlp(1)
    spec = jm.align.symmetry(function, a, X)
    first = jm.align.activation_similarity(spec, function, a, b, [X, X])
    calls.clear()
    again = jm.align.activation_similarity(spec, function, a, b, [X])
    assert not calls
    chex.assert_trees_all_close(first, again, atol=1e-5)


def test_a_function_that_cannot_be_hashed_has_activations() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, params: Any, x: jax.Array) -> jax.Array:
            return mlp(params, x)

    a = draw_mlp(0)
    spec = jm.align.symmetry(mlp, a, X)
    found = jm.align.activation_similarity(spec, Unhashable(), a, a, [X])
    chex.assert_trees_all_equal(found, jm.align.activation_similarity(spec, mlp, a, a, [X]))
