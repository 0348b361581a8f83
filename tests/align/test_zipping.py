"""Zipping: the greedy merging against a plain loop, whole models, any number of them, heads and ties."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from align import models
from align.models import attention, draw_attention, draw_mlp, mlp

import jaxmerge as jm
from jaxmerge.align.zipping import greedy, kmeans

X = jax.random.normal(jax.random.key(0), (64, 5))
TOKENS = jax.random.normal(jax.random.key(1), (16, 4, 3))


def oracle(similarity: np.ndarray, models: int, a: float, b: float) -> list[int]:
    """ZipIt's greedy merging with lists of units, in float64."""
    units = len(similarity)
    kept = units // models
    clusters = [[i] for i in range(units)]
    origin = [i // kept for i in range(units)]
    budget = [int((units - kept) // models * b)] * models
    s = np.array(similarity, np.float64)
    np.fill_diagonal(s, -np.inf)
    for m in range(models):
        if not budget[m]:
            mine = [i for i in range(units) if origin[i] == m]
            s[np.ix_(mine, mine)] = -np.inf
    while len(clusters) > kept:
        i, j = sorted(divmod(int(np.argmax(s)), len(s)))
        row = np.minimum(s[i], s[j])
        row = np.where(np.isfinite(row), a * row, row)
        s[i], s[:, i] = row, row
        s[i, i] = -np.inf
        s = np.delete(np.delete(s, j, 0), j, 1)
        clusters[i] += clusters.pop(j)
        if origin[i] == origin.pop(j):
            budget[origin[i]] -= 1
            if not budget[origin[i]]:
                mine = [k for k, o in enumerate(origin) if o == origin[i]]
                s[np.ix_(mine, mine)] = -np.inf
    return [next(k for k, c in enumerate(clusters) if unit in c) for unit in range(units)]


@pytest.mark.parametrize("models", [2, 3])
def test_the_greedy_merging_is_that_of_the_paper(models: int) -> None:
    rng = np.random.default_rng(models)
    features = rng.standard_normal((models * 6, 4))
    similarity = np.corrcoef(features)
    run = jax.jit(greedy, static_argnums=1)
    for a, b in ((0.5, 1.0), (0.9, 0.5), (1e-4, 1.0)):
        found = run(jnp.asarray(similarity, jnp.float32), models, a, b)
        assert found.tolist() == oracle(similarity, models, a, b)


def test_without_a_budget_nothing_merges_within_a_model() -> None:
    rng = np.random.default_rng(5)
    similarity = jnp.asarray(np.corrcoef(rng.standard_normal((12, 3))))
    labels = greedy(similarity, 2, 0.9, 0.0)
    assert sorted(labels[:6].tolist()) == sorted(labels[6:].tolist()) == list(range(6))


def test_the_greedy_merging_runs_over_many_alphas_at_once() -> None:
    rng = np.random.default_rng(3)
    one, other = (jnp.asarray(np.corrcoef(rng.standard_normal((8, 9)))) for _ in range(2))
    alphas = jnp.array([0.1, 0.5, 0.9])
    found = jax.vmap(lambda t: greedy(t * one + (1 - t) * other, 2))(alphas)
    for t, labels in zip(alphas, found, strict=True):
        assert labels.tolist() == greedy(t * one + (1 - t) * other, 2).tolist()


def test_kmeans_ends_where_every_unit_is_nearest_to_its_own_mean() -> None:
    rng = np.random.default_rng(0)
    centres = 10 * rng.standard_normal((4, 3))
    truth = np.array([0, 1, 2, 3, 0, 1, 2, 3, 3, 2])
    x = centres[truth] + 0.1 * rng.standard_normal((10, 3))
    start = jnp.array([0, 1, 2, 3, 0, 1, 2, 3, 2, 1])
    labels = np.asarray(kmeans(jnp.asarray(x @ x.T), start, 4))
    means = np.stack([x[labels == c].mean(0) for c in range(4)])
    assert labels.tolist() == truth.tolist()
    assert np.argmin(((x[:, None] - means) ** 2).sum(-1), 1).tolist() == labels.tolist()


def copies(function: Any, one: Any, x: jax.Array, count: int) -> tuple[Any, list[Any]]:
    spec = jm.align.symmetry(function, one, x)
    keys = jax.random.split(jax.random.key(4), count - 1)
    others = [jm.align.permute(spec, jm.align.random(spec, key), one) for key in keys]
    return spec, [one, *others]


def test_permuted_copies_zip_to_the_model_itself() -> None:
    one = draw_mlp(0)
    spec, models = copies(mlp, one, X, 3)
    merged, info = jm.align.zipit(spec, models, jm.align.activation_space(), x=X, apply_fn=mlp, a=1)
    chex.assert_trees_all_close(merged, one, atol=1e-6)
    assert info.score > 0.999


def test_heads_are_matched_and_what_is_read_within_them_is_merged() -> None:
    one = draw_attention(0)
    spec, models = copies(attention, one, TOKENS, 2)
    space = jm.align.dual_space(0.5)
    merged, info = jm.align.zipit(spec, models, space, x=TOKENS, apply_fn=attention)
    chex.assert_trees_all_close(merged, one, atol=1e-5)
    values = [name for name, c in info.clusters.items() if c.shape == (2, 2, 5)]
    assert len(values) == 1
    assert all(c.shape[-1] != 4 for c in info.clusters.values())


@pytest.mark.parametrize(
    "name", ["grouped_query_attention", "group_norm_network", "scanned_network"]
)
def test_copies_with_units_within_others_zip_to_the_model_itself(name: str) -> None:
    function, one = getattr(models, name), getattr(models, f"draw_{name}")(0)
    x = TOKENS if name == "grouped_query_attention" else X
    spec, others = copies(function, one, x, 2)
    assert any(node.parents for node in spec.nodes)
    space = jm.align.dual_space(0.5)
    merged, info = jm.align.zipit(spec, others, space, x=x, apply_fn=function, b=0.0)
    chex.assert_trees_all_close(merged, one, atol=1e-5)
    assert info.score > 0.999


def test_units_merge_within_their_group_or_layer_alone() -> None:
    """Each head's, group's or layer's clusters hold its own units of both models, as many as one model has."""
    x = X
    for function, draw, within in (
        (models.group_norm_network, models.draw_group_norm_network, (3, 2, 4)),
        (models.scanned_network, models.draw_scanned_network, (3, 2, 8)),
    ):
        two = [draw(seed) for seed in (0, 5)]
        spec = jm.align.symmetry(function, two[0], x)
        merged, info = jm.align.zipit(
            spec, two, jm.align.activation_space(), x=x, apply_fn=function
        )
        (labels,) = [c for c in info.clusters.values() if c.shape == within]
        for one in np.asarray(labels):
            assert sorted(set(one.ravel())) == list(range(within[-1]))
        assert np.all(np.isfinite(function(merged, x)))


def test_merged_weights_follow_from_the_clusters() -> None:
    models = [draw_mlp(i) for i in (1, 2)]
    spec = jm.align.symmetry(mlp, models[0], X)
    merged, info = jm.align.zipit(
        spec, models, jm.align.activation_space(), x=X, apply_fn=mlp, method="kmeans"
    )
    labels = [np.asarray(info.clusters[f"fc{i}"]) for i in (1, 2)]
    expected = np.zeros((12, 12))
    sizes = np.bincount(labels[1].ravel(), minlength=12)
    for m, model in enumerate(models):
        w = np.asarray(model["fc2.weight"], np.float64)
        for i in range(12):
            for j in range(12):
                expected[labels[1][m, i], labels[0][m, j]] += w[i, j] / sizes[labels[1][m, i]]
    np.testing.assert_allclose(merged["fc2.weight"], expected, atol=1e-6)


def test_a_zip_is_one_program_for_many_shares_of_the_weights() -> None:
    models = [draw_mlp(i) for i in (1, 2)]
    spec = jm.align.symmetry(mlp, models[0], X)

    def merged(alpha: jax.Array) -> Any:
        space = jm.align.dual_space(alpha)
        return jm.align.zipit(spec, models, space, x=X, apply_fn=mlp, sweeps=3)[0]

    alphas = jnp.array([0.2, 0.9])
    together = jax.jit(jax.vmap(merged))(alphas)
    for i, alpha in enumerate(alphas):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        chex.assert_trees_all_close(one, merged(alpha), atol=1e-6)


def test_flattened_maps_and_fused_segments_are_merged_as_the_spec_says() -> None:
    spec = jm.align.PermutationSpec.from_axes(
        {
            "conv": (None, "P"),
            "both": (None, [("P",), ("Q",)]),
            "head": ((2, "P"), "Q"),
            "o": ("Q",),
        },
        roles={"o": ("in",)},
    )
    rng = np.random.default_rng(2)
    shapes = {"conv": (5, 3), "both": (4, 5), "head": (6, 2), "o": (2,)}
    one = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}
    two = jm.align.permute(spec, {"P": [2, 0, 1], "Q": [1, 0]}, one)
    merged, _ = jm.align.zipit(spec, [one, two], jm.align.weight_space(), b=0.0)
    chex.assert_trees_all_close(merged, one, atol=1e-6)


def test_tied_embeddings_are_matched_not_merged() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        h = p["embedding"][x]
        return jnp.tanh(h @ p["up"]) @ p["down"] @ p["embedding"].T

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embedding": (7, 6), "up": (6, 8), "down": (8, 6)}
    one = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}
    spec, models = copies(function, one, jnp.arange(5), 2)
    merged, info = jm.align.zipit(spec, models, jm.align.weight_space())
    chex.assert_trees_all_close(merged, one, atol=1e-6)
    roles = {axis.role for node in info.clusters for _, _, axis in spec.uses(node)}
    assert "both" not in roles


def test_what_is_missing_is_said() -> None:
    one = draw_mlp(0)
    spec = jm.align.symmetry(mlp, one, X)
    with pytest.raises(ValueError, match="two models or more, found 1"):
        jm.align.zipit(spec, [one], jm.align.weight_space())
    with pytest.raises(ValueError, match="give x= and apply_fn="):
        jm.align.zipit(spec, [one, one], jm.align.dual_space())
    broken = {**one, "fc2.weight": one["fc2.weight"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"the similarity of node 'fc\d' is not finite"):
        jm.align.zipit(spec, [one, broken], jm.align.weight_space())


def test_a_partial_zip_shares_the_first_layers_and_keeps_every_models_own_tail() -> None:
    models = [draw_mlp(i) for i in (1, 2)]
    spec = jm.align.symmetry(mlp, models[0], X)
    space = jm.align.activation_space()
    params, axes, info = jm.align.partial_zip(spec, models, space, ["fc1"], x=X, apply_fn=mlp)
    assert axes == {"fc1.weight": None, "fc2.weight": 0, "fc3.weight": 0, "fc4.weight": 0}
    outputs = jax.vmap(mlp, in_axes=(axes, None))(params, X)
    labels = np.asarray(info.clusters["fc1"])
    sizes = np.bincount(labels.ravel(), minlength=12)
    first = np.zeros((12, 5))
    for m, model in enumerate(models):
        np.add.at(first, labels[m], np.asarray(model["fc1.weight"], np.float64))
    hidden = np.maximum(np.asarray(X, np.float64) @ (first / sizes[:, None]).T, 0)
    for m, model in enumerate(models):
        h = hidden[:, labels[m]]
        for name in ("fc2", "fc3"):
            h = np.maximum(h @ np.asarray(model[f"{name}.weight"], np.float64).T, 0)
        h = h @ np.asarray(model["fc4.weight"], np.float64).T
        np.testing.assert_allclose(outputs[m], h, atol=1e-5)
    half = jm.align.partial_zip(spec, models, space, 0.7, x=X, apply_fn=mlp)
    assert half[1] == {"fc1.weight": None, "fc2.weight": None, "fc3.weight": 0, "fc4.weight": 0}
    with pytest.raises(ValueError, match="'fc2' is computed from 'fc1'"):
        jm.align.partial_zip(spec, models, space, ["fc2"], x=X, apply_fn=mlp)


def test_a_share_of_layers_counts_groups_of_units_too() -> None:
    def grouped(p: Any, x: jax.Array) -> jax.Array:
        for name in ("fc1", "fc2"):
            x = (x @ p[name]).reshape(len(x), 2, -1)
            x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
            x = jax.nn.relu(x.reshape(len(x), -1))
        return x @ p["head"]

    shapes = {"fc1": (5, 6), "fc2": (6, 6), "head": (6, 2)}
    models = [
        {
            name: jax.random.normal(jax.random.key(10 * i + len(name)), shape)
            for name, shape in shapes.items()
        }
        for i in (1, 2)
    ]
    spec = jm.align.symmetry(grouped, models[0], X)
    assert any(node.parents for node in spec.free())
    space = jm.align.activation_space()
    _, axes, _ = jm.align.partial_zip(spec, models, space, 0.5, x=X, apply_fn=grouped)
    assert axes == {"fc1": None, "fc2": 0, "head": 0}
