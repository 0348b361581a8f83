"""Task-vector operators beyond mergekit's dialect, against float64 oracles."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import beyond, task_vectors

import jaxmerge as jm
from jaxmerge.converters import load_checkpoint, save_checkpoint
from jaxmerge.methods.operators import pcb
from jaxmerge.recipes import make_plan, parse, run

# Sorted by name: ties over the whole model go to the name that sorts first.
SHAPES = {"conv": (2, 3, 4), "matrix": (5, 7), "scalar": (), "vector": (6,)}

Tree = dict[str, np.ndarray]
Points = Sequence[Mapping[str, Any]]


def trees(
    count: int = 3, *, seed: int = 0, equal: bool = False, shapes: Any = SHAPES
) -> tuple[Tree, list[Tree]]:
    """A base and models; with `equal`, task vectors of few distinct values and many zeros."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        values = rng.integers(-2, 3, shape) / 4 if equal else rng.normal(size=shape)
        # On a grid, so that sums and differences of models are exact.
        return np.asarray(np.round(values * 2**12) / 2**12, np.float32)

    base = {name: draw(shape) for name, shape in shapes.items()}
    return base, [{n: base[n] + draw(s) for n, s in shapes.items()} for _ in range(count)]


def agree(merged: Any, expected: Mapping[str, np.ndarray]) -> None:
    for name, values in expected.items():
        size = float(np.max(np.abs(values), initial=1e-6))
        found = np.asarray(merged[name], np.float64)
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-5 * size, err_msg=name)


def check(
    name: str,
    points: Points,
    oracle: Callable[..., Any],
    *,
    counts: Sequence[int] = (3, 1),
    whole: bool = False,
    **options: Any,
) -> None:
    """Compares merging at once, and from a state, with `oracle(base, models, **point)`.

    On models with and without equal entries, and on few and one of them. Values per model are cut to their number. The
    oracle takes one tensor, or the `whole` model.
    """
    method = jm.methods.get(name)(**options)
    for count in counts:
        for equal in (False, True):
            base, models = trees(count, seed=count, equal=equal)
            state = method.init(models, base)
            for point in points:
                given = {k: v[:count] if isinstance(v, list) else v for k, v in point.items()}
                if whole:
                    expected = oracle(base, models, **given)
                else:
                    expected = {n: oracle(base[n], [m[n] for m in models], **given) for n in SHAPES}
                for merged in (
                    jm.merge(method, models, base=base, **given),
                    method.apply(state, given),
                ):
                    agree(merged[0] if method.per_task else merged, expected)


WEIGHTS = [[1.0, 1.0, 1.0], [0.25, 0.75, 1.5], [0.5, -0.25, 1.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]
SCALES: Points = [{}, {"scale": 0.5}, {"scale": -1.5}]


# Entry by entry -----------------------------------------------------------------------------------------------------


def test_magmax() -> None:
    check("magmax", SCALES, beyond.magmax)


def test_negmerge() -> None:
    check("negmerge", SCALES, beyond.negmerge)


def test_wise_ft() -> None:
    points = [{"t": t} for t in (0.0, 0.3, 1.0, 1.5)]
    check("wise_ft", points, lambda base, models, t: beyond.wise_ft(base, *models, t), counts=[1])


def test_the_ends_of_wise_ft_are_exact() -> None:
    base, (model,) = trees(1)
    chex.assert_trees_all_equal(jm.merge("wise_ft", [model], base=base, t=0), base)
    chex.assert_trees_all_equal(jm.merge("wise_ft", [model], base=base, t=1), model)


def test_median() -> None:
    weights = [
        [1.0, 2.0, 1.0, 3.0],
        [0.1, 0.2, 0.3, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [1.0, 0.0, 1.0, 0.0],
    ]
    points: Points = [{}, *({"weight": weight} for weight in weights)]
    check("median", points, lambda base, models, **p: beyond.median(models, **p), counts=(4, 3, 1))


def test_one_outlier_among_three_does_not_move_the_median_out_of_the_others() -> None:
    _, (one, other) = trees(2)
    outlier = {name: array + 1e6 for name, array in one.items()}
    merged = jm.merge("median", [one, other, outlier])
    for name, array in merged.items():
        low, high = np.minimum(one[name], other[name]), np.maximum(one[name], other[name])
        assert np.all((low <= array) & (array <= high))


# TALL masks ---------------------------------------------------------------------------------------------------------

THRESHOLDS: Points = [
    {"threshold": [0.25, 0.5, 1.0], "scale": 0.5},
    {"threshold": 0.0},
    *({"threshold": 0.5, "weight": weight} for weight in WEIGHTS),
]


def test_consensus() -> None:
    points: Points = [
        {"minimum": minimum, **point} for minimum in (0, 1, 2, 3) for point in THRESHOLDS
    ]
    check("consensus", [{}, *points], beyond.consensus)


def test_tall_masks_add_up_like_task_arithmetic() -> None:
    def oracle(base: Any, models: Any, threshold: Any = None, **point: Any) -> Any:
        return task_vectors.task_arithmetic(base, models, **point)

    check("tall_masks", THRESHOLDS, oracle)


@pytest.mark.parametrize("equal", [False, True])
def test_the_masks_of_tall_masks_and_what_they_make_of_each_task(equal: bool) -> None:
    base, models = trees(seed=4, equal=equal)
    method = jm.methods.tall_masks()
    state = method.init(models, base)
    for point in THRESHOLDS:
        merged, per_task = method.apply(state, point)
        np.testing.assert_array_equal(per_task.factors, np.ones(3))
        rest = {k: v for k, v in point.items() if k != "scale"}
        for name in SHAPES:
            masks = beyond.tall_masks(base[name], [m[name] for m in models], **rest)
            np.testing.assert_array_equal(per_task.masks[name], masks, err_msg=name)
        for task in range(3):
            mine = jm.methods.for_task(merged, base, per_task, task)
            masked = {n: np.where(per_task.masks[n][task], merged[n], base[n]) for n in SHAPES}
            agree(mine, masked)


# Scores -------------------------------------------------------------------------------------------------------------

RATIOS: Points = [
    {},
    {"ratio": 0.3, "scale": 1.2},
    {"ratio": [0.1, 0.5, 0.9]},
    {"ratio": 0.0},
    {"ratio": 1.0},
]


def test_pcb_over_each_tensor() -> None:
    check("pcb", RATIOS, beyond.pcb, counts=[3], scope="tensor")


def test_pcb_over_the_whole_model() -> None:
    check("pcb", RATIOS, beyond.pcb_model_scope, whole=True)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_pcb_keeps_exactly_k_of_equal_scores_those_of_lower_index(scope: Any) -> None:
    base = {"a": np.zeros((3, 3), np.float32), "b": np.zeros((3, 3), np.float32)}
    model = {name: array + np.float32(0.3) for name, array in base.items()}
    method = jm.methods.pcb(scope=scope)
    state = method.init([model, model], base)
    once = jax.jit(lambda m, ratio: jm.merge(method, [m, m], base=base, ratio=ratio))
    for ratio in (0.25, 0.5, 0.75):
        kept = np.zeros((2, 9), bool)
        if scope == "tensor":
            kept[:, : int(ratio * 9)] = True
        else:
            kept.reshape(-1)[: int(ratio * 18)] = True
        for merged in (once(model, ratio), method.apply(state, {"ratio": ratio})):
            found = np.stack([np.ravel(merged["a"]), np.ravel(merged["b"])])
            np.testing.assert_array_equal(found != 0, kept)


def test_pcb_keeps_as_many_in_every_program() -> None:
    base, (model,) = trees(1, seed=9, shapes={"a": (40, 30), "b": (40, 30)})
    method = jm.methods.pcb()
    state = method.init([model], base)
    for merged in (
        jm.merge(method, [model], base=base, ratio=0.37),
        jax.jit(lambda m: jm.merge(method, [m], base=base, ratio=0.37))(model),
        jax.jit(method.apply)(state, {"ratio": 0.37}),
    ):
        changed = sum(int(np.sum(np.asarray(merged[name]) != base[name])) for name in base)
        assert changed == int(0.37 * 2400)


def test_pcb_behind_a_choice_is_pcb() -> None:
    base, models = trees(2, seed=13, shapes={"w": (5, 7)})
    method = jm.methods.choose([jm.methods.magmax(), jm.methods.pcb()])
    merged = method.apply(method.init(models, base), {"method": 1, "pcb": {"ratio": 0.3}})
    agree(merged, beyond.pcb_model_scope(base, models, 0.3))


def test_the_shift_of_exponents_that_many_models_need_cancels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pcb, "HIGHEST", 1.0)
    base, models = trees(3, seed=12, shapes={"w": (13,)})
    expected = beyond.pcb_model_scope(base, models, 0.5)
    agree(jm.merge("pcb", models, base=base, ratio=0.5), expected)


# The whole model ----------------------------------------------------------------------------------------------------


def test_metagpt() -> None:
    check("metagpt", SCALES, beyond.metagpt, whole=True)


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("equal", [False, True])
def test_emr_and_the_models_that_it_makes_for_each_task(means: Any, equal: bool) -> None:
    method = jm.methods.emr(means=means)
    for count in (3, 1):
        base, models = trees(count, seed=5, equal=equal)
        expected = beyond.emr(base, models, means)
        state = method.init(models, base)
        for merged, per_task in (
            jm.merge(method, models, base=base),
            method.apply(state),
        ):
            agree(merged, {n: base[n] + expected.unified[n] for n in SHAPES})
            np.testing.assert_allclose(per_task.factors, expected.rescalers, rtol=1e-5)
            for task in range(count):
                for name, mask in expected.masks[task].items():
                    np.testing.assert_array_equal(per_task.masks[name][task], mask, err_msg=name)
                mine = jm.methods.for_task(merged, base, per_task, task)
                agree(mine, beyond.emr_task(base, expected, task))


def test_the_scale_of_emr_reaches_the_models_of_the_tasks() -> None:
    base, models = trees(seed=6)
    expected = beyond.emr(base, models)
    merged, per_task = jm.merge("emr", models, base=base, scale=0.5)
    mine = jm.methods.for_task(merged, base, per_task, 1)
    full = beyond.emr_task(base, expected, 1)
    agree(mine, {n: base[n] + 0.5 * (full[n] - base[n]) for n in SHAPES})


# Layouts ------------------------------------------------------------------------------------------------------------

LAYERS = {
    **{f"layers.{i}.w": (4, 6) for i in range(3)},
    "wte.weight": (5, 2),
    "head.weight": (2, 5),
}
LAYOUT = jm.tree.Layout(
    {
        "stack": jm.tree.TensorLayout(
            tuple(f"layers.{i}.w" for i in range(3)), axes=(1, 0), stacked=True
        ),
        "embed": jm.tree.TensorLayout(("wte.weight",)),
        "head": jm.tree.TensorLayout(("head.weight",), axes=(1, 0)),
    }
)


def to_flax(flat: Mapping[str, Any], lead: int = 0) -> dict[str, Any]:
    """The checkpoint's tensors, after `lead` axes, as transposed leaves and stacked layers."""
    stack = np.stack([np.swapaxes(flat[f"layers.{i}.w"], -1, -2) for i in range(3)], axis=lead)
    head = np.swapaxes(flat["head.weight"], -1, -2)
    return {"embed": np.asarray(flat["wte.weight"]), "head": head, "stack": stack}


@pytest.mark.parametrize("name", ["tall_masks", "emr"])
def test_masks_have_the_shapes_of_the_leaves_and_are_those_of_the_checkpoint(name: str) -> None:
    base, models = trees(2, seed=7, shapes=LAYERS)
    _, flat = jm.merge(name, models, base=base)
    flax_models, flax_base = list(map(to_flax, models)), to_flax(base)
    method = jm.methods.get(name)()
    state = method.init(flax_models, flax_base, layout=LAYOUT)
    for merged, per_task in (
        jm.merge(method, flax_models, base=flax_base, layout=LAYOUT),
        method.apply(state),
    ):
        expected = to_flax(flat.masks, lead=1)
        for path, leaf in merged.items():
            assert per_task.masks[path].dtype == bool
            assert per_task.masks[path].shape == (2, *leaf.shape)
            np.testing.assert_array_equal(per_task.masks[path], expected[path])
        np.testing.assert_allclose(per_task.factors, flat.factors, rtol=1e-6)


DEPTHS: Points = [
    {"alpha": 0.2, "beta": 0.8},
    {"alpha": 0.5, "beta": -0.5, "weight": [0.3, 0.9], "scale": 0.7, "normalize": True},
    {"alpha": 1.0, "beta": 0.0, "weight": [1.0, -1.0], "normalize": True},
]


def lined(base: Tree, models: list[Tree], **point: Any) -> Tree:
    """The input lies with the first layer, the output with the last."""
    layer = {"wte.weight": 0, "head.weight": 2, **{f"layers.{i}.w": i for i in range(3)}}
    return {n: beyond.lines(base[n], [m[n] for m in models], layer[n], 3, **point) for n in LAYERS}


def test_lines_scale_layers_by_their_names_stacked_or_not() -> None:
    base, models = trees(2, seed=8, shapes=LAYERS)
    flax_models, flax_base = list(map(to_flax, models)), to_flax(base)
    method = jm.methods.lines()
    state = method.init(models, base)
    stacked = method.init(flax_models, flax_base, layout=LAYOUT)
    for point in DEPTHS:
        expected = lined(base, models, **point)
        agree(jm.merge(method, models, base=base, **point), expected)
        agree(method.apply(state, point), expected)
        agree(method.apply(stacked, point), to_flax(expected))


def test_lines_take_a_model_of_one_layer_as_its_first() -> None:
    base, (model,) = trees(1, shapes={"layers.0.w": (3, 2)})
    merged = jm.merge("lines", [model], base=base, alpha=0.3, beta=5.0)
    name = "layers.0.w"
    agree(merged, {name: beyond.lines(base[name], [model[name]], 0, 1, 0.3, 5.0)})


# Recipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("lines", {"alpha": 0.25, "beta": 0.5, "weight": 0.5}),
        ("tall_masks", {"threshold": 0.5, "weight": 0.5}),
        ("emr", {}),
        ("pcb", {"ratio": 0.3}),
    ],
)
def test_a_recipe_gives_what_memory_gives(
    name: str, point: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, models = trees(2, seed=10, shapes=LAYERS)
    for i, tree in enumerate((base, *models)):
        save_checkpoint(tmp_path / f"m{i}.safetensors", tree)
    given = ", ".join(f"{key}: {value}" for key, value in point.items())
    recipe = f"""
merge_method: {name}
base_model: m0.safetensors
models: [{{model: m1.safetensors}}, {{model: m2.safetensors}}]
parameters: {{{given}}}
"""
    run(make_plan(parse(recipe), out="out.safetensors"))
    merged = jm.merge(name, models, base=base, **point)
    merged = merged[0] if jm.methods.get(name)().per_task else merged
    chex.assert_trees_all_equal(load_checkpoint("out.safetensors"), dict(merged))


# Gradients ----------------------------------------------------------------------------------------------------------


def test_gradients_to_the_models_are_finite_where_models_coincide() -> None:
    base, (model,) = trees(1, seed=11, shapes={"w": (3, 2)})
    names = ("consensus", "emr", "lines", "magmax", "median", "metagpt", "negmerge", "pcb")

    def objective(models: Any) -> jax.Array:
        merged = [jm.merge(name, models, base=base) for name in (*names, "tall_masks")]
        merged.append(jm.merge("wise_ft", models[:1], base=base))
        leaves = [leaf for leaf in jax.tree.leaves(merged) if leaf.dtype == jnp.float32]
        return sum(jnp.sum(jnp.square(leaf)) for leaf in leaves)

    gradient = jax.jit(jax.grad(objective))
    for models in ([model, model], [base, base], [base, model]):
        chex.assert_tree_all_finite(gradient(models))
