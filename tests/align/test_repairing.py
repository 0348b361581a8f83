"""REPAIR and the reset of running statistics, against sums written out in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.align import PermutationSpec

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 5))


def mlp(params: Any, x: jax.Array) -> jax.Array:
    for name in ("fc1", "fc2"):
        layer = params[name]
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def draw(seed: int, widths: tuple[int, ...] = (5, 7, 6, 3)) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        name: {"kernel": rng.standard_normal((n, m)), "bias": rng.standard_normal(m)}
        for name, n, m in zip(("fc1", "fc2", "head"), widths, widths[1:], strict=False)
    }


def pre_activations(params: Any, x: np.ndarray) -> list[np.ndarray]:
    found = []
    for name in ("fc1", "fc2"):
        x = x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
        found.append(x)
        x = np.maximum(x, 0)
    return found


def test_units_of_the_merged_model_have_the_weighted_statistics_of_its_sources() -> None:
    a, b = draw(0), draw(1)
    weights = np.array([0.3, 0.7])
    with jax.enable_x64(True):
        spec = jm.align.symmetry(mlp, a, X)
        merged = jm.merge("linear", [a, b], weight=list(weights))
        repaired, info = jm.align.repair(spec, mlp, merged, [a, b], X, weights)
    assert info.repaired == (("fc1/bias", "fc1/kernel"), ("fc2/bias", "fc2/kernel"))
    assert info.skipped == ()
    of_a, of_b = pre_activations(a, X), pre_activations(b, X)
    for layer, one, other in zip(pre_activations(repaired, X), of_a, of_b, strict=True):
        np.testing.assert_allclose(
            layer.mean(0), 0.3 * one.mean(0) + 0.7 * other.mean(0), atol=1e-12
        )
        np.testing.assert_allclose(layer.std(0), 0.3 * one.std(0) + 0.7 * other.std(0), rtol=1e-12)
    np.testing.assert_array_equal(repaired["head"]["kernel"], merged["head"]["kernel"])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_norms_and_images_are_repaired_by_the_norms_scale_and_bias(norm: str) -> None:
    config = jm.models.VGGConfig(((4,),), (), 3, 1, norm=norm, groups=2, dtype="float64")
    model = jm.models.VGG(config)
    images = RNG.standard_normal((6, 4, 4, 3))
    with jax.enable_x64(True):
        a, b = (randomised(model.init(jax.random.key(0), images), seed) for seed in (1, 2))
        merged = jax.tree.map(lambda p, q: (p + q) / 2, a, b)
        spec = jm.align.symmetry(model.apply, a, images)
        repaired, info = jm.align.repair(spec, model.apply, merged, [a, b], images)
        outputs = [np.asarray(normed(model, params, images)) for params in (a, b, repaired)]
    kinds = [tuple(path.rpartition("/")[2] for path in pair) for pair in info.repaired]
    assert kinds == [("bias", "kernel"), ("bias", "scale")]
    one, other, new = ((out.mean((0, 1, 2)), out.std((0, 1, 2))) for out in outputs)
    np.testing.assert_allclose(new, (np.array(one) + np.array(other)) / 2, atol=1e-10)


def randomised(variables: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape)), variables)


def normed(model: Any, variables: Any, images: Any) -> jax.Array:
    """What the first norm gives, as Flax records it."""
    found = model.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])[1]
    (name,) = [name for name in found["intermediates"] if "norm" in name]
    return jax.tree.leaves(found["intermediates"][name])[0]


def test_what_takes_no_shift_is_named() -> None:
    def bare(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"] + p["c"][None]) @ p["d"]

    params = {
        "a": jnp.ones((5, 4)),
        "b": jnp.ones((4, 3)),
        "c": jnp.zeros(3),
        "d": jnp.ones((3, 2)),
    }
    spec = PermutationSpec.from_axes(
        {"a": (None, "P"), "b": ("P", "Q"), "c": ("Q",), "d": ("Q", None)}
    )
    x = jnp.asarray(X, jnp.float32)
    _, info = jm.align.repair(spec, bare, params, [params], x)
    assert info.skipped == ("P",)
    without = PermutationSpec.from_axes({"a": (None, "P"), "b": ("P", None)})
    with pytest.raises(ValueError, match=r"no unit can be repaired.*'P'"):
        jm.align.repair(without, bare, params, [params], x)
    with pytest.raises(ValueError, match="expected 1 weights"):
        jm.align.repair(spec, bare, params, [params], x, [0.5, 0.5])
    with pytest.raises(ValueError, match="found none"):
        jm.align.repair(spec, bare, params, [], x)


def test_a_layer_that_is_used_twice_is_left_alone() -> None:
    def twice(p: Any, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = jnp.tanh(x @ p["w"] + p["b"][None])
        return jnp.tanh(x @ p["v"] + p["c"][None]) @ p["out"]

    sizes = {"w": (5, 5), "b": (5,), "v": (5, 4), "c": (4,), "out": (4, 2)}
    params = {k: jnp.asarray(RNG.standard_normal(s), jnp.float32) for k, s in sizes.items()}
    spec = PermutationSpec.from_axes(
        {"b": ("P",), "w": (None, "P"), "v": ("P", "Q"), "c": ("Q",), "out": ("Q", None)}
    )
    _, info = jm.align.repair(spec, twice, params, [params], jnp.asarray(X, jnp.float32))
    assert info.repaired == (("c", "v"),)
    assert info.skipped == ("P",)


def test_running_statistics_become_the_mean_over_batches() -> None:
    model = jm.models.VGG(jm.models.VGGConfig(((4,),), (), 3, 1))
    batches = [jnp.asarray(RNG.standard_normal((4, 4, 4, 3)), jnp.float32) for _ in range(3)]
    variables = model.init(jax.random.key(0), batches[0])
    wrong = {**variables, "batch_stats": jax.tree.map(lambda s: s + 5, variables["batch_stats"])}

    def apply_train(v: Any, x: jax.Array) -> Any:
        return model.apply(v, x, train=True, mutable=["batch_stats"])

    new = jm.align.reset_batch_norm(apply_train, wrong, batches)
    kernel, *_ = (
        leaf for leaf in jax.tree.leaves(variables["params"]) if leaf.shape == (3, 3, 3, 4)
    )
    biases = [
        leaf for path, leaf in jm.tree.flatten(variables)[0].items() if path.endswith("conv0/bias")
    ]
    shift = np.asarray(biases[0]) if biases else 0
    means, variances = [], []
    for batch in batches:
        padded = np.pad(np.asarray(batch, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
        out = np.einsum("nhwcij,ijco->nhwo", windows, np.asarray(kernel, np.float64)) + shift
        means.append(out.mean((0, 1, 2)))
        variances.append(out.var((0, 1, 2)))
    (statistics,) = new["batch_stats"].values()
    np.testing.assert_allclose(statistics["mean"], np.mean(means, 0), atol=1e-5)
    np.testing.assert_allclose(statistics["var"], np.mean(variances, 0), rtol=1e-4)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, new["params"], variables["params"]))


def test_statistics_that_cannot_be_reset_are_refused() -> None:
    def keep(v: Any, x: jax.Array) -> Any:
        return x, v

    stats = {"batch_stats": {"mean": jnp.zeros(1)}}
    with pytest.raises(ValueError, match="does not move the statistic 'batch_stats/mean'"):
        jm.align.reset_batch_norm(keep, stats, [jnp.ones(2)])
    with pytest.raises(ValueError, match="at least one batch"):
        jm.align.reset_batch_norm(keep, stats, [])
    with pytest.raises(ValueError, match="no path is a running statistic"):
        jm.align.reset_batch_norm(keep, {"w": jnp.ones(1)}, [jnp.ones(2)])
    with pytest.raises(ValueError, match="returns no new 'batch_stats/mean'"):
        jm.align.reset_batch_norm(lambda v, x: (x, {}), stats, [jnp.ones(2)])
