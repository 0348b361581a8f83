"""Merges through singular values against their float64 oracles."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import spectral

import jaxmerge as jm
from jaxmerge.methods import MergeMethod

SHAPES = {
    "square": (6, 6),
    "tall": (8, 4),
    "wide": (4, 8),
    "column": (5, 1),
    "vector": (5,),
    "scalar": (),
    "conv": (2, 3, 2, 2),
}
MODELS = 3
WEIGHT = [0.5, 1.0, 1.2]
Tensors = dict[str, np.ndarray]


class Case(NamedTuple):
    """A method at a point, and its oracle over a whole tree."""

    name: str
    point: dict[str, Any]
    options: dict[str, Any]
    oracle: Callable[..., Tensors]

    def method(self) -> MergeMethod:
        return jm.methods.get(self.name)(**self.options)

    def expected(self, base: Tensors, models: list[Tensors], **other: Any) -> Tensors:
        return self.oracle(base, models, **{**self.point, **self.options, **other})


def per_tensor(oracle: Callable[..., Any]) -> Callable[..., Tensors]:
    return lambda base, models, **point: {
        name: oracle(base[name], [model[name] for model in models], **point) for name in base
    }


def tsv(base: np.ndarray, models: list[np.ndarray], rank: float = 1.0, **point: Any) -> np.ndarray:
    kept = max(math.floor(rank * min(base.shape) / len(models)), 1) if base.ndim == 2 else None
    return spectral.tsv(base, models, rank=kept, **point)


def cart(
    _: np.ndarray, models: list[np.ndarray], rank: float = 0.08, scale: float = 1.0
) -> np.ndarray:
    count = math.floor(rank * min(models[0].shape, default=0))
    return spectral.cart(models, max(count, 1) if rank > 0 else 0, scale)


TSV, ISO_C, ISO_CTS = map(per_tensor, (tsv, spectral.iso_c, spectral.iso_cts))
KNOTS, STAR, CART = map(per_tensor, (spectral.knots, spectral.star, cart))
DENSITY = [0.35, 0.65, 1.0]
CASES = [
    Case("tsv", {"scale": 0.9, "weight": WEIGHT}, {}, TSV),
    Case("iso_c", {"scale": 1.3, "mixing": 0.7}, {}, ISO_C),
    Case("iso_cts", {"scale": 0.7}, {}, ISO_CTS),
    Case("knots", {"weight": WEIGHT, "density": DENSITY, "scale": 0.8}, {}, KNOTS),
    Case("star", {"eta": 0.45, "weight": WEIGHT, "scale": 1.1}, {}, STAR),
    Case("cart", {"rank": 0.5, "scale": 0.6}, {}, CART),
    Case("opcm", {"scale": 0.9}, {}, spectral.opcm),
]
VARIANTS = [
    Case("tsv", {}, {"rank": 2.5}, TSV),
    Case("iso_cts", {}, {"common": 0.25}, ISO_CTS),
    Case("knots", {"density": 0.5, "normalize": False, "rescale": True}, {}, KNOTS),
    Case("knots", {"weight": [0.5, -1.0, 1.2], "density": 1.0}, {"divisor": "signed"}, KNOTS),
    Case("star", {"eta": 1.0, "normalize": False}, {}, STAR),
    Case("cart", {"rank": 0.01}, {}, CART),
    Case("opcm", {}, {"alpha": 0.0}, spectral.opcm),
    Case("opcm", {}, {"alpha": 0.9, "scope": "tensor"}, spectral.opcm),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def draw(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).normal(size=shape), np.float32)


def rank_one(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Whole numbers, so that a base of ones and their sum are exact."""
    rng = np.random.default_rng(seed)
    if len(shape) != 2:
        return rng.integers(-4, 5, shape).astype(np.float32)
    # No two magnitudes are equal: which of them is trimmed would be for rounding to say.
    left, right = ((1 + rng.permutation(size)) * rng.choice([-1, 1], size) for size in shape)
    return np.outer(left, right).astype(np.float32)


def inputs() -> tuple[Tensors, list[Tensors]]:
    """Every shape with task vectors of full rank and of rank 1, equal ones, zeros, and one that is not zero."""
    base: Tensors = {}
    deltas: list[Tensors] = [{} for _ in range(MODELS)]
    for i, (name, shape) in enumerate(SHAPES.items()):
        full = [draw(10 * t + i, shape) for t in range(MODELS)]
        low = [rank_one(10 * t + i, shape) for t in range(MODELS)]
        nothing = np.zeros(shape, np.float32)
        kinds = {
            "full": full,
            "low": low,
            "equal": [full[0]] * MODELS,
            "zero": [nothing] * MODELS,
            "one": [nothing, full[0], nothing],
        }
        for kind, each in kinds.items():
            base[f"{name}/{kind}"] = np.ones(shape, np.float32)
            for delta, array in zip(deltas, each, strict=True):
                delta[f"{name}/{kind}"] = array
    return base, [{name: base[name] + delta[name] for name in base} for delta in deltas]


def of(tree: Tensors, *shapes: str) -> Tensors:
    return {name: tree[name] for name in tree if name.split("/")[0] in shapes}


def agree(merged: Any, expected: Tensors, tolerance: float = 3e-5) -> None:
    for name, want in expected.items():
        np.testing.assert_allclose(merged[name], want, rtol=tolerance, atol=tolerance, err_msg=name)


@every_case
def test_a_candidate_is_what_the_oracle_gives(case: Case) -> None:
    base, models = inputs()
    method = case.method()
    agree(method.apply(method.init(models, base), case.point), case.expected(base, models))


@pytest.mark.parametrize(
    "case", CASES + VARIANTS, ids=lambda case: "-".join([case.name, *map(str, case.options)])
)
def test_a_merge_is_what_the_oracle_gives(case: Case) -> None:
    base, *models = (of(tree, "tall") for tree in (inputs()[0], *inputs()[1]))
    merged = jm.merge(case.method(), models, base=base, **case.point)
    agree(merged, case.expected(base, models))


@every_case
def test_one_model_is_enough(case: Case) -> None:
    base, model = (of(tree, "wide") for tree in (inputs()[0], inputs()[1][0]))
    point = {k: v[:1] if isinstance(v, list) else v for k, v in case.point.items()}
    merged = jm.merge(case.method(), [model], base=base, **point)
    agree(merged, case.expected(base, [model], **point))


@pytest.mark.parametrize(
    ("name", "swept", "points"),
    [
        ("tsv", "weight", [0.0, 0.4, 1.7]),
        ("iso_c", "mixing", [0.0, 0.4, 1.0]),
        ("knots", "density", [0.0, 0.3, 1.0]),
        ("star", "eta", [0.0, 0.55, 1.0]),
        ("cart", "rank", [0.0, 0.5, 1.0]),
    ],
)
def test_a_sweep_is_what_the_oracle_gives_point_by_point_and_traces_once(
    name: str, swept: str, points: list[float]
) -> None:
    case = next(case for case in CASES if case.name == name)._replace(point={})
    base, *models = (of(tree, "wide") for tree in (inputs()[0], *inputs()[1]))
    method = case.method()
    state = method.init(models, base)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def sweep(values: jax.Array) -> Any:
        return jax.vmap(lambda value: method.apply(state, {swept: value}))(values)

    merged = sweep(jnp.asarray(points))
    sweep(jnp.asarray(points) * 0.5)
    for i, point in enumerate(points):
        expected = case.expected(base, models, **{swept: point})
        agree({name: values[i] for name, values in merged.items()}, expected)


@every_case
def test_a_candidate_decomposes_nothing(case: Case) -> None:
    base, *models = (of(tree, "wide", "vector") for tree in (inputs()[0], *inputs()[1]))
    method = case.method()
    state = method.init(models, base)
    assert "lapack" in jax.jit(method.init).lower(models, base).as_text()
    assert "lapack" not in jax.jit(method.apply).lower(state, {}).as_text()


@every_case
def test_outputs_are_outputs_on_whatever_axis_they_lie(case: Case) -> None:
    base, *models = ({"w": draw(t, (4, 8))} for t in range(MODELS + 1))
    turned_base, *turned = ({"w": tree["w"].T} for tree in (base, *models))
    layout = jm.tree.Layout({"w": jm.tree.TensorLayout(("w",), outputs=(1,))})
    expected = case.expected(base, models)["w"].T
    merged = jm.merge(case.method(), turned, base=turned_base, layout=layout, **case.point)
    agree(merged, {"w": expected})


def test_the_whole_spectrum_of_one_model_is_that_model() -> None:
    base, model = {"w": draw(0, (4, 8))}, {"w": draw(1, (4, 8))}
    for name, point in (("star", {"eta": 1.0}), ("knots", {"density": 1.0}), ("tsv", {})):
        agree(jm.merge(name, [model], base=base, **point), model)


def test_task_vectors_that_cancel_leave_the_base() -> None:
    base, delta = np.ones((4, 8), np.float32), rank_one(1, (4, 8))
    models = [{"w": base + delta}, {"w": base - delta}]
    for name in ("iso_c", "iso_cts", "star"):
        agree(jm.merge(name, models, base={"w": base}), {"w": base})


@pytest.mark.parametrize(
    ("name", "options"),
    [("tsv", {"rank": 0.0}), ("iso_cts", {"common": 1.1}), ("opcm", {"alpha": -0.1})],
)
def test_options_out_of_bounds_are_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{name}: {next(iter(options))} must"):
        jm.methods.get(name)(**options)
