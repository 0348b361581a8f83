"""Merges that weigh parameters by data, against float64 oracles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import data_driven

import jaxmerge as jm
from jaxmerge.methods import Gram

SHAPES = {"matrix": (4, 6), "tall": (7, 3), "vector": (5,), "scalar": ()}
MODELS = 3
WEIGHTS = [[1.0, 1.0, 1.0], [0.2, 0.7, 1.5]]

Tree = dict[str, np.ndarray]


def trees(seed: int) -> tuple[Tree, list[Tree]]:
    rng = np.random.default_rng(seed)

    def draw(size: float) -> Tree:
        return {n: (size * rng.normal(size=s)).astype(np.float32) for n, s in SHAPES.items()}

    base = draw(1.0)
    return base, [{n: base[n] + d for n, d in draw(0.3).items()} for _ in range(MODELS)]


def positive(seed: int) -> list[Tree]:
    """Values like Fisher information: of very different sizes, some of them zero."""
    rng = np.random.default_rng(seed)
    return [
        {
            n: (np.exp(3 * rng.normal(size=s)) * (rng.random(s) > 0.3)).astype(np.float32)
            for n, s in SHAPES.items()
        }
        for _ in range(MODELS)
    ]


def moments(seed: int, size: int, examples: int) -> list[np.ndarray]:
    """Second moments of inputs; singular where there are fewer examples than inputs."""
    rng = np.random.default_rng(seed)
    return [
        data_driven.gram(rng.normal(size=(examples, size)) * np.exp(rng.normal(size=size)))
        for _ in range(MODELS)
    ]


def agree(merged: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for name, values in expected.items():
        size = float(np.max(np.abs(values), initial=1e-6))
        np.testing.assert_allclose(
            np.asarray(merged[name], np.float64),
            values,
            rtol=tolerance,
            atol=tolerance * size,
            err_msg=name,
        )


def both(name: str, models: Any, point: Any, *, base: Any = None, extras: Any = None) -> list[Any]:
    """Merged at once, and from a state."""
    method = jm.methods.get(name)()
    state = method.init(models, base, extras=extras)
    once = jm.merge(name, models, base=base, extras=extras, **point)
    return [once, method.apply(state, point)]


@pytest.mark.parametrize("weight", [*WEIGHTS, [1.0, -1.0, 0.5]])
@pytest.mark.parametrize("floor", [0.0, 1e-6, 0.5])
def test_fisher(weight: list[float], floor: float) -> None:
    _, models = trees(0)
    information = positive(1)
    expected = {
        n: data_driven.fisher([m[n] for m in models], [f[n] for f in information], weight, floor)
        for n in SHAPES
    }
    point = {"weight": weight, "floor": floor}
    for merged in both("fisher", models, point, extras={"fisher": information}):
        agree(merged, expected, 1e-4 if min(weight) < 0 else 1e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("with_prior", [False, True])
def test_uncertainty(weight: list[float], with_prior: bool) -> None:
    base, models = trees(2)
    curvature, (prior, *_) = positive(3), positive(4)
    extras = {"curvature": curvature, **({"prior": prior} if with_prior else {})}
    expected = {
        n: data_driven.uncertainty(
            base[n],
            [m[n] for m in models],
            [h[n] for h in curvature],
            (prior[n] if with_prior else 0.0) + np.full(SHAPES[n], 0.25),
            weight,
        )
        for n in SHAPES
    }
    point = {"weight": weight, "precision": 0.25}
    for merged in both("uncertainty", models, point, base=base, extras=extras):
        agree(merged, expected)


def test_wudi_is_the_minimiser() -> None:
    base, models = trees(5)
    models[1] = dict(base)
    expected = {
        n: data_driven.wudi(base[n], [m[n] for m in models], 0.8) for n in ("matrix", "tall")
    }
    for n in ("vector", "scalar"):
        expected[n] = base[n] + 0.8 * np.mean([m[n] - base[n] for m in models], axis=0)
    for merged in both("wudi", models, {"scale": 0.8}, base=base):
        agree(merged, expected)


def test_wudi_by_adam_comes_down_from_the_sum_to_the_minimiser() -> None:
    base, models = trees(6)
    method = jm.methods.wudi(solver="adam", steps=2000, learning_rate=1e-2)
    merged = method.apply(method.init(models, base), {})
    agree(
        {"matrix": merged["matrix"]},
        {"matrix": data_driven.wudi(base["matrix"], [m["matrix"] for m in models])},
        2e-3,
    )


def test_regmean_leaves_what_has_no_gram_at_the_mean() -> None:
    _, models = trees(7)
    grams = moments(8, 6, 40)
    extras = {"grams": [{"matrix": gram} for gram in grams]}
    weight, alpha, ridge = [0.5, 1.0, 2.0], 0.9, 1e-3
    total = sum(w * np.trace(g) for w, g in zip(weight, grams, strict=True)) / 6
    expected = {n: np.mean([m[n] for m in models], axis=0, dtype=np.float64) for n in SHAPES}
    expected["matrix"] = data_driven.regmean(
        [m["matrix"] for m in models], grams, alpha, weight, ridge * total
    )
    point = {"weight": weight, "alpha": alpha, "ridge": ridge}
    for merged in both("regmean", models, point, extras=extras):
        agree(merged, expected, 1e-4)


@pytest.mark.parametrize("examples", [40, 2])
@pytest.mark.parametrize("with_outputs", [False, True])
def test_mats(examples: int, with_outputs: bool) -> None:
    _, models = trees(9)
    inputs, outputs = moments(10, 6, examples), moments(11, 4, examples)
    extras = {"inputs": [{"matrix": one} for one in inputs]}
    if with_outputs:
        extras["outputs"] = [{"matrix": one} for one in outputs]
    expected = {n: np.mean([m[n] for m in models], axis=0, dtype=np.float64) for n in SHAPES}
    expected["matrix"] = data_driven.mats(
        [m["matrix"] for m in models], inputs, outputs if with_outputs else None
    )
    for merged in both("mats", models, {}, extras=extras):
        agree(merged, expected, 2e-3)


@pytest.mark.parametrize("name", ["regmean", "mats"])
def test_a_gram_says_which_axes_are_inputs_and_a_layout_keeps_them(name: str) -> None:
    """A Flax kernel [inputs, heads, width], the same weights as [heads * width, inputs] of a checkpoint."""
    rng = np.random.default_rng(12)
    extra = "grams" if name == "regmean" else "inputs"
    flat = [{"q.weight": rng.normal(size=(6, 5)).astype(np.float32)} for _ in range(2)]
    grams = moments(13, 5, 30)[:2]
    expected = jm.merge(name, flat, extras={extra: [{"q.weight": gram} for gram in grams]})
    kernels = [{"q": jnp.asarray(m["q.weight"].T.reshape(5, 3, 2))} for m in flat]
    told = {extra: [{"q": Gram(jnp.asarray(gram), (0,))} for gram in grams]}
    layout = jm.tree.Layout({"q": jm.tree.TensorLayout(("q.weight",), (1, 2, 0), (6, 5))})
    for chosen in (None, layout):
        merged = jm.merge(name, kernels, extras=told, layout=chosen)
        np.testing.assert_allclose(
            merged["q"].reshape(5, 6).T, expected["q.weight"], rtol=1e-4, atol=1e-5
        )


def test_a_gram_over_two_axes_in_any_order() -> None:
    """Inputs flattened as (width, heads) in the Gram, as (heads, width) in the checkpoint."""
    rng = np.random.default_rng(14)
    flat = [{"o.weight": rng.normal(size=(4, 6)).astype(np.float32)} for _ in range(2)]
    grams = moments(15, 6, 30)[:2]
    expected = jm.merge("regmean", flat, extras={"grams": [{"o.weight": g} for g in grams]})
    kernels = [{"o": jnp.asarray(m["o.weight"].T.reshape(3, 2, 4))} for m in flat]
    turned = [g.reshape(3, 2, 3, 2).transpose(1, 0, 3, 2).reshape(6, 6) for g in grams]
    told = {"grams": [{"o": Gram(jnp.asarray(gram), (1, 0))} for gram in turned]}
    layout = jm.tree.Layout({"o": jm.tree.TensorLayout(("o.weight",), (2, 0, 1), (4, 6))})
    for chosen in (None, layout):
        merged = jm.merge("regmean", kernels, extras=told, layout=chosen)
        np.testing.assert_allclose(
            merged["o"].reshape(6, 4).T, expected["o.weight"], rtol=1e-4, atol=1e-5
        )


def test_stacked_layers_have_a_gram_each() -> None:
    rng = np.random.default_rng(16)
    layers = [[rng.normal(size=(3, 5)).astype(np.float32) for _ in range(4)] for _ in range(2)]
    grams = [moments(17 + i, 5, 20)[:2] for i in range(4)]
    stacked = [{"w": jnp.stack(one)} for one in layers]
    extras = {"grams": [{"w": jnp.stack([jnp.asarray(g[t]) for g in grams])} for t in range(2)]}
    layout = jm.tree.stacked_layout(stacked[0], {"w": "layers.{layer}.w"})
    merged = jm.merge("regmean", stacked, extras=extras, layout=layout)
    for i in range(4):
        alone = [{"w": one[i]} for one in layers]
        each = {"grams": [{"w": g} for g in grams[i]]}
        np.testing.assert_allclose(
            merged["w"][i], jm.merge("regmean", alone, extras=each)["w"], rtol=1e-4, atol=1e-5
        )


def test_extras_follow_their_blocks() -> None:
    base, models = trees(18)
    information = positive(19)
    methods = {"by data": jm.methods.fisher(), "plain": jm.methods.linear()}
    method = jm.methods.by_block(methods, {"matrix": "by data", "**": "plain"})
    merged = jm.merge(method, models, base=base, extras={"fisher": information})
    whole = jm.merge("fisher", models, extras={"fisher": information})
    np.testing.assert_array_equal(merged["matrix"], whole["matrix"])
    np.testing.assert_array_equal(merged["tall"], jm.merge("linear", models)["tall"])


def test_extras_serve_a_chosen_method() -> None:
    base, models = trees(20)
    information = positive(21)
    method = jm.methods.choose([jm.methods.linear(), jm.methods.fisher()])
    state = method.init(models, base, extras={"fisher": information})
    for i, name in enumerate(("linear", "fisher")):
        extras = {"fisher": information} if name == "fisher" else None
        alone = jm.merge(name, models, extras=extras)
        np.testing.assert_allclose(
            method.apply(state, {"method": i})["tall"], alone["tall"], rtol=1e-6, atol=1e-7
        )


def _fisher_of(tree: Any) -> dict[str, Any]:
    return {"fisher": tree}


@pytest.mark.parametrize(
    ("name", "extras", "message"),
    [
        ("fisher", None, "needs extras={'fisher'"),
        ("fisher", {"fischer": []}, "did you mean 'fisher'"),
        ("fisher", {"fisher": {}}, "a list with one entry per model, found dict"),
        ("fisher", {"fisher": [{}]}, r"needs 2 entries \(one per model\), found 1"),
        ("fisher", {"fisher": [{"w": jnp.ones((2, 3))}, {}]}, r"fisher\[1\] lacks tensor 'w'"),
        (
            "fisher",
            {"fisher": [{"w": jnp.ones((2, 3))}, {"w": jnp.ones((3, 2))}]},
            r"fisher\[1\]: tensor 'w' should have shape \[2, 3\], found \[3, 2\]",
        ),
        ("regmean", {"grams": [{"v": jnp.eye(3)}] * 2}, "'v', which is not merged"),
        ("regmean", {"grams": [{"w": jnp.ones((2, 3))}] * 2}, "should be square"),
        (
            "regmean",
            {"grams": [{"w": jnp.eye(2)}] * 2},
            r"should have shape \[3, 3\], found \[2, 2\]",
        ),
        ("regmean", {"grams": [{"w": jnp.eye(3)}, {}]}, r"grams\[1\] lacks 'w'"),
    ],
)
def test_bad_extras_are_named_before_work(name: str, extras: Any, message: str) -> None:
    models = [{"w": jnp.zeros((2, 3))}, {"w": jnp.ones((2, 3))}]
    with pytest.raises(ValueError, match=message):
        jm.merge(name, models, extras=extras)


def test_gradients_reach_the_weights_through_the_solvers() -> None:
    _, models = trees(22)
    extras = {"inputs": [{"matrix": one} for one in moments(23, 6, 3)]}
    method = jm.methods.mats(iterations=20)
    state = method.init(models, extras=extras)

    def objective(weight: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(method.apply(state, {"weight": weight})["matrix"]))

    start = jnp.asarray([0.5, 1.0, 2.0])
    slopes = jax.grad(objective)(start)
    for i in range(MODELS):
        step = jnp.zeros(MODELS).at[i].set(1e-2)
        found = (objective(start + step) - objective(start - step)) / 2e-2
        np.testing.assert_allclose(slopes[i], found, rtol=0.05, atol=5e-3)
