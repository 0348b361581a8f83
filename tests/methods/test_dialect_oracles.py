"""The operators of mergekit's dialect against float64 oracles, at the library's options and at the dialect's."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import averages, dialect, spherical, task_vectors

import jaxmerge as jm
from jaxmerge.converters import load_checkpoint, save_checkpoint
from jaxmerge.methods import draws
from jaxmerge.recipes import make_plan, parse, run
from jaxmerge.recipes.dialect import MERGEKIT

SHAPES = {"matrix": (5, 7), "vector": (6,), "conv": (2, 3, 4), "scalar": (), "column": (4, 1)}
KEY = jax.random.key(11)

Tree = dict[str, np.ndarray]
Points = Sequence[Mapping[str, Any]]


def trees(
    count: int = 3, *, seed: int = 0, equal: bool = False, spread: float = 0.5
) -> tuple[Tree, list[Tree]]:
    """A base and models; with `equal`, task vectors of few distinct values and many zeros."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...], size: float) -> np.ndarray:
        values = rng.integers(-2, 3, shape) / 4 if equal else size * rng.normal(size=shape)
        # On a grid, so that sums and differences of models are exact.
        return np.asarray(np.round(values * 2**12) / 2**12, np.float32)

    base = {name: draw(shape, 1.0) for name, shape in SHAPES.items()}
    models = [{n: base[n] + draw(s, spread) for n, s in SHAPES.items()} for _ in range(count)]
    return base, models


def agree(merged: Any, expected: Mapping[str, np.ndarray]) -> None:
    for name, values in expected.items():
        size = float(np.max(np.abs(values), initial=1e-6))
        found = np.asarray(merged[name], np.float64)
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-5 * size, err_msg=name)


def check(
    name: str,
    base: Tree | None,
    models: list[Tree],
    points: Points,
    oracle: Callable[..., np.ndarray],
    *,
    only: Sequence[str] = tuple(SHAPES),
    **options: Any,
) -> None:
    """Compares merging at once, and from a state, with `oracle(base, models, **point)` of each tensor."""
    method = jm.methods.get(name)(**options)
    base = None if base is None else {n: base[n] for n in only}
    models = [{n: model[n] for n in only} for model in models]
    key = KEY if method.random else None
    state = method.init(models, base)
    for point in points:
        expected = {
            n: oracle(base[n] if base else None, [m[n] for m in models], **point) for n in only
        }
        agree(jm.merge(method, models, base=base, key=key, **point), expected)
        agree(method.apply(state, point, key), expected)


WEIGHTS = [[1.0, 1.0, 1.0], [0.2, 0.7, 1.5], [0.5, -0.3, 0.9], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]


# Random by rank -----------------------------------------------------------------------------------------------------


def uniforms(name: str, shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    hashed = jnp.asarray(jm.tree.name_words(name), jnp.uint32)
    seeds = draws.tensor_seeds(draws.key_words(KEY), hashed, count)
    return [np.asarray(u) for u in draws.uniform(seeds, count, shape, jnp.uint32(0))]


@pytest.mark.parametrize("name", ["della_linear", "della"])
@pytest.mark.parametrize("norm", ["paper", "l1"])
def test_della_with_its_own_draws(name: str, norm: Any) -> None:
    base, models = trees(seed=1)
    method = jm.methods.get(name)(rescale_norm=norm)
    state = method.init(models, base)
    points: Points = [
        {"density": 0.5, "epsilon": 0.2, "weight": [0.5, 1.0, -0.8], "scale": 0.9},
        {"density": [0.3, 0.9, 0.6], "epsilon": [0.3, 0.1, 0.5], "normalize": True},
        {"density": 0.0, "epsilon": 0.2},
        {"density": 1.0, "epsilon": 0.2, "normalize": False},
        {"density": 0.5, "epsilon": 0.0, "rescale": False},
    ]
    for point in points:
        expected = {}
        for tensor, shape in SHAPES.items():
            given = {"weight": 1.0, **point}
            rescale = norm if given.pop("rescale", True) else None
            given["uniforms"] = uniforms(tensor, shape, 3)
            deltas = [m[tensor] for m in models]
            expected[tensor] = getattr(dialect, name)(
                base[tensor], deltas, rescale=rescale, **given
            )
        agree(method.apply(state, point, KEY), expected)
        agree(jm.merge(method, models, base=base, key=KEY, **point), expected)


def test_della_keeps_large_entries_more_often_and_the_mean_in_place() -> None:
    delta = np.arange(1, 9, dtype=np.float32)[::-1].copy()
    base, model = {"w": np.zeros(8, np.float32)}, {"w": delta}
    method = jm.methods.della_linear()
    state = method.init([model], base)
    point = {"density": 0.5, "epsilon": 0.3}
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: method.apply(state, point, key)["w"])(keys)
    kept = np.mean(np.asarray(drawn) != 0, axis=0)
    np.testing.assert_allclose(kept, dialect.keep_probability(delta, 0.5, 0.3), atol=0.04)
    np.testing.assert_allclose(np.mean(drawn, axis=0), delta, rtol=0.15)


# Bands of magnitudes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(name: str, equal: bool) -> None:
    base, models = trees(seed=2, equal=equal)
    points: Points = [
        {"density": 0.5, "gamma": 0.2, "weight": weight, "normalize": i % 2 == 0, "scale": 0.7}
        for i, weight in enumerate(WEIGHTS)
    ]
    points += [
        {"density": [0.9, 0.3, 0.05], "gamma": [0.3, 0.01, 0.5], "rescale": True},
        {"density": 1.0, "gamma": 0.5},
        {"density": 0.0, "gamma": 0.5},
        {"density": 0.7, "gamma": 0.0},
    ]
    check(name, base, models, [{"weight": 1.0, **p} for p in points], getattr(dialect, name))


def test_breadcrumbs_ties_may_divide_by_signed_weights() -> None:
    base, models = trees(seed=3)
    point = {"weight": [0.5, -0.3, 0.9], "density": 0.5, "gamma": 0.1, "normalize": True}

    def oracle(base: Any, models: Any, **point: Any) -> np.ndarray:
        return dialect.breadcrumbs_ties(base, models, divisor="signed", **point)

    check("breadcrumbs_ties", base, models, [point], oracle, divisor="signed")


# Spheres ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["tensor", "last", "first"])
@pytest.mark.parametrize("zero_norm", ["line", "arc"])
@pytest.mark.parametrize("with_base", [False, True])
def test_nuslerp(over: str, zero_norm: str, with_base: bool) -> None:
    base, models = trees(2, seed=4)
    origin = base if with_base else {n: np.zeros_like(x) for n, x in base.items()}
    models[1]["matrix"][2] = origin["matrix"][2]
    models[0]["vector"] = origin["vector"].copy()
    models[1]["conv"][0] = origin["conv"][0] + 1.0001 * (models[0]["conv"][0] - origin["conv"][0])

    def oracle(base: Any, models: Any, weight: Any) -> np.ndarray:
        structure = {"flatten": over == "tensor", "row_wise": over == "first"}
        return dialect.nuslerp(models, weight, base, **structure, dialect=zero_norm == "arc")

    points: Points = [{"weight": w} for w in ([1.0, 1.0], [0.3, 0.9], [0.5, -0.2], [1.0, -1.0])]
    options = {"over": over, "zero_norm": zero_norm}
    check("nuslerp", base if with_base else None, models, points, oracle, **options)


@pytest.mark.parametrize("tangent", ["arc", "chord"])
@pytest.mark.parametrize("with_base", [False, True])
def test_multislerp(tangent: str, with_base: bool) -> None:
    base, models = trees(seed=5, spread=1.0)
    origin = base if with_base else {n: np.zeros_like(x) for n, x in base.items()}
    models[2]["vector"] = origin["vector"].copy()
    models[1]["matrix"] = 2 * origin["matrix"] - models[0]["matrix"]

    def oracle(base: Any, models: Any, **point: Any) -> np.ndarray:
        return dialect.multislerp(models, base=base, dialect=tangent == "chord", **point)

    points: Points = [
        {"weight": weight, "normalize_weights": normalize}
        for weight in ([1.0, 1.0, 0.0], [0.2, 0.7, 1.5], [0.5, -0.3, 0.9], [0.0, 0.0, 0.0])
        for normalize in (True, False)
    ]
    check("multislerp", base if with_base else None, models, points, oracle, tangent=tangent)


def test_karcher() -> None:
    far = np.random.default_rng(6)
    _, models = trees(3, seed=6)
    for n in ("matrix", "conv"):
        models[1][n] = np.asarray(0.9 * models[0][n] + 0.4 * models[1][n], np.float32)
        models[2][n] = np.asarray(-0.5 * models[0][n] + 2 * far.normal(size=SHAPES[n]), np.float32)
    models[1]["vector"] = np.zeros(6, np.float32)

    def oracle(base: Any, models: Any, **point: Any) -> np.ndarray:
        return dialect.karcher(models, **point)

    points: Points = [
        {},
        {"max_iter": 0},
        {"max_iter": 1},
        {"max_iter": 3},
        {"max_iter": 60, "tol": 0.0},
        {"max_iter": 10, "tol": 0.1},
    ]
    some = ("matrix", "vector", "conv", "column")
    check("karcher", None, models, points, oracle, only=some)
    joined = jm.merge("karcher", models[1:], base=models[0])
    agree(joined, {n: dialect.karcher([m[n] for m in models]) for n in some})


def test_karcher_of_opposite_models_is_their_mean() -> None:
    _, (model, *_) = trees(1)
    opposite = {n: np.asarray(-3 * x) for n, x in model.items()}
    agree(jm.merge("karcher", [model, opposite]), {n: np.asarray(-x) for n, x in model.items()})


def test_gradients_pass_through_the_steps_of_karcher() -> None:
    models = [{"matrix": model["matrix"]} for model in trees(seed=7)[1]]

    def length(model: Any) -> jax.Array:
        return jnp.sum(jm.merge("karcher", [model, *models[1:]])["matrix"] ** 2)

    step = 1e-2 * np.asarray(models[1]["matrix"])
    slope = np.sum(np.asarray(jax.grad(length)(models[0])["matrix"]) * step)

    def at(sign: int) -> float:
        moved = np.asarray(models[0]["matrix"], np.float64) + sign * step
        mean = dialect.karcher([moved, *[m["matrix"] for m in models[1:]]], 60, 0.0)
        return float(np.sum(mean**2))

    np.testing.assert_allclose(slope, (at(1) - at(-1)) / 2, rtol=1e-3)


# Angles and energies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["tensor", "last"])
@pytest.mark.parametrize("guard", ["clamp", "floor"])
def test_model_stock(over: str, guard: str) -> None:
    base, models = trees(seed=8)
    for n in ("matrix", "conv"):
        models[1][n] = base[n] + 0.7 * (models[0][n] - base[n]) + 0.3 * (models[1][n] - base[n])
        models[2][n] = base[n] + 0.9 * (models[0][n] - base[n]) - 0.2 * (models[2][n] - base[n])
    models[1]["vector"] = base["vector"].copy()
    models[2]["matrix"][1] = base["matrix"][1]

    def oracle(base: Any, models: Any, scale: float = 1.0) -> np.ndarray:
        merged = dialect.model_stock(base, models, over == "last", dialect=guard == "floor")
        return base + scale * (merged - base)

    # Numbers have cosines of 1 and -1, where the unguarded formula has a pole.
    only = tuple(SHAPES) if guard == "clamp" else ("matrix", "vector", "conv")
    for count in (1, 2, 3):
        chosen, options = models[:count], {"over": over, "guard": guard}
        check("model_stock", base, chosen, [{}, {"scale": 0.3}], oracle, only=only, **options)


@pytest.mark.parametrize("at_mergekit", [False, True])
@pytest.mark.parametrize(
    # Equal variances of three models differ in the oracle: a mean of three rounds.
    ("count", "equal"),
    [(1, False), (2, False), (3, False), (1, True), (2, True), (4, True)],
)
def test_sce(at_mergekit: bool, count: int, equal: bool) -> None:
    base, models = trees(count, seed=9, equal=equal)

    def oracle(base: Any, models: Any, select_topk: float) -> np.ndarray:
        return dialect.sce(base, models, select_topk, at_mergekit)

    points: Points = [{"select_topk": k} for k in (0.0, 0.1, 0.3, 0.5, 0.77, 1.0)]
    check("sce", base, models, points, oracle, **(MERGEKIT["sce"].options if at_mergekit else {}))


def test_sce_weighs_small_task_vectors_as_large_ones_or_alike() -> None:
    base = {n: np.zeros(shape, np.float32) for n, shape in SHAPES.items()}
    _, large = trees(3, seed=10)
    deltas = [{n: 1e-4 * (m[n] - base[n]) for n in SHAPES} for m in large]
    check("sce", base, deltas, [{"select_topk": 0.5}], dialect.sce)
    merged = jm.merge("sce", deltas, base=base, options={"weak": "uniform"})
    for n in SHAPES:
        values = np.stack([d[n] for d in deltas]).astype(np.float64)
        agrees = np.sign(values) == np.where(values.sum(0) >= 0, 1.0, -1.0)
        expected = (values * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
        agree({n: merged[n]}, {n: expected})


# Entry by entry -----------------------------------------------------------------------------------------------------


def test_nearswap() -> None:
    base, models = trees(1, seed=11)
    models[0]["vector"][2] = base["vector"][2]

    def oracle(base: Any, models: Any, t: float) -> np.ndarray:
        return dialect.nearswap(base, models[0], t)

    check("nearswap", base, models, [{"t": t} for t in (0.0, 1e-4, 0.2, 5.0)], oracle)


@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_arcee_fusion(spread: float) -> None:
    base, models = trees(1, seed=12, spread=spread)

    def oracle(base: Any, models: Any) -> np.ndarray:
        return dialect.arcee_fusion(base, models[0])

    check("arcee_fusion", base, models, [{}], oracle)


@pytest.mark.parametrize("name", ["ram", "ramplus_tl"])
def test_ram(name: str) -> None:
    base, models = trees(seed=13, equal=True)
    points: Points = [{"epsilon": 1e-5}, {"epsilon": 0.3}]
    if name == "ramplus_tl":
        points = [{**p, "r": r, "alpha": a} for p in points for r, a in ((0.1, 0.2), (0.5, 3.0))]
    check(name, base, models, points, getattr(dialect, name))


def test_passthrough() -> None:
    _, models = trees(1, seed=14)

    def oracle(base: Any, models: Any, scale: float = 1.0) -> np.ndarray:
        return dialect.passthrough(models[0], scale)

    check("passthrough", None, models, [{}, {"scale": -0.3}], oracle)


# Recipes ------------------------------------------------------------------------------------------------------------

SIGNED = {"divisor": "signed"}
W = [0.5, -0.3, 0.9]
Recipes = dict[str, tuple[str, Callable[[Any, list[Any]], np.ndarray]]]
RECIPES: Recipes = {
    "linear": ("", lambda b, m: averages.linear([*m, b], [*W, 0.7])),
    "task_arithmetic": ("lambda: 0.8", lambda b, m: task_vectors.task_arithmetic(b, m, W, 0.8)),
    "ties": (
        "density: 0.01",
        lambda b, m: task_vectors.ties(b, m, W, 0.01, keep_one=True, **SIGNED),
    ),
    "dare_linear": ("density: 1", lambda b, m: task_vectors.task_arithmetic(b, m, W)),
    "dare_ties": (
        "{density: 1, normalize: true}",
        lambda b, m: task_vectors.ties(b, m, W, 1.0, **SIGNED),
    ),
    "della_linear": ("density: 1", lambda b, m: task_vectors.task_arithmetic(b, m, W)),
    "della": ("density: 1", lambda b, m: task_vectors.ties(b, m, W, 1.0, **SIGNED)),
    "breadcrumbs": (
        "{density: 0.5, gamma: 0.2}",
        lambda b, m: dialect.breadcrumbs(b, m, W, 0.5, 0.2),
    ),
    "breadcrumbs_ties": (
        "{density: 0.5, gamma: 0.2, normalize: true}",
        lambda b, m: dialect.breadcrumbs_ties(b, m, W, 0.5, 0.2, 1.0, True, **SIGNED),
    ),
    "slerp": ("t: 0.3", lambda b, m: spherical.slerp(b, m[0], 0.3, True)),
    "nuslerp": (
        "nuslerp_flatten: false",
        lambda b, m: dialect.nuslerp(m, W[:2], b, False, dialect=True),
    ),
    "multislerp": ("", lambda b, m: dialect.multislerp(m, W, b, dialect=True)),
    "karcher": ("max_iter: 2", lambda b, m: dialect.karcher([*m, b], 2)),
    "model_stock": (
        "filter_wise: true",
        lambda b, m: dialect.model_stock(b, m, True, dialect=True),
    ),
    "sce": ("select_topk: 0.4", lambda b, m: dialect.sce(b, m, 0.4, True)),
    "nearswap": ("t: 0.3", lambda b, m: dialect.nearswap(b, m[0], 0.3)),
    "arcee_fusion": ("", lambda b, m: dialect.arcee_fusion(b, m[0])),
    "ram": ("epsilon: 0.2", lambda b, m: dialect.ram(b, m, 0.2)),
    "ramplus_tl": ("epsilon: 0.2", lambda b, m: dialect.ramplus_tl(b, m, epsilon=0.2)),
    "passthrough": ("scale: 0.7", lambda b, m: dialect.passthrough(m[0], 0.7)),
}


@pytest.mark.parametrize("name", sorted(MERGEKIT))
def test_a_mergekit_recipe_gives_what_the_dialect_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    count = {"nuslerp": 2}.get(name, 1 if name in ("slerp", "nearswap", "arcee_fusion") else 3)
    count = 1 if name == "passthrough" else count
    base, models = trees(count, seed=15)
    shapes = ("matrix", "conv", "scalar")
    for i, tree in enumerate((base, *models)):
        save_checkpoint(tmp_path / f"m{i}.safetensors", {name: tree[name] for name in shapes})
    given, oracle = RECIPES[name]
    lines = [f"merge_method: {name}", "models:"]
    for i in range(count):
        lines.append(f"- {{model: m{i + 1}.safetensors, parameters: {{weight: {W[i]}}}}}")
    if name != "passthrough":
        lines.insert(1, "base_model: m0.safetensors")
    shared = given if given.startswith("{") else "{" + given + "}"
    if name == "linear":
        shared = "{weight: 0.7}"
    lines.append(f"parameters: {shared}")
    run(make_plan(parse("\n".join(lines)), out="out.safetensors"))
    agree(
        load_checkpoint("out.safetensors"),
        {n: oracle(base[n], [model[n] for model in models]) for n in shapes},
    )
