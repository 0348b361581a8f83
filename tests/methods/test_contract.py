"""What every registered method owes, from one table."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxmerge as jm
from jaxmerge.methods import Hyperparameter, MergeMethod

SHAPES = {"narrow": (4, 1, 1, 1), "matrix": (8, 5), "scalar": ()}


def variants(name: str) -> list[MergeMethod]:
    """A method at its default options, and with each option at each of its other values."""
    constructor = jm.methods.get(name)
    found = [constructor()]
    for option, default in jm.methods.options(constructor).items():
        for value in jm.methods.allowed(constructor, option) or ():
            if value != default:
                found.append(constructor(**{option: value}))
    return found


def combinators() -> list[MergeMethod]:
    methods = jm.methods
    family = [methods.task_arithmetic(), methods.ties(), methods.dare_ties(rescale_norm="l1")]
    return [
        methods.choose(family),
        methods.choose([methods.linear(), methods.ties(scope="tensor"), methods.dare_linear()]),
        methods.by_block(
            {"wide": methods.ties(), "rest": methods.dare_linear()},
            {"nested/matrix": "wide", "**": "rest"},
        ),
    ]


def label(method: MergeMethod) -> str:
    return method.name


METHODS = [jm.methods.get(name)() for name in jm.methods.names()] + combinators()
VARIANTS = [method for name in jm.methods.names() for method in variants(name)[1:]]
every_method = pytest.mark.parametrize("method", METHODS, ids=label)
every_variant = pytest.mark.parametrize("method", METHODS + VARIANTS, ids=label)


def model(seed: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    draw = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}
    return {
        "nested": {
            "matrix": draw.pop("matrix"),
            "twin": jnp.asarray(rng.normal(size=(8, 5)), dtype),
        },
        "list": [draw.pop("narrow")],
        **draw,
        "empty": jnp.zeros((0, 3), dtype),
        "steps": jnp.asarray(7 + seed, jnp.int32),
        "mask": jnp.asarray([True, seed % 2 == 0]),
    }


def inputs(method: MergeMethod, dtype: Any = jnp.float32) -> tuple[list[Any], Any]:
    """Models and a base that the method takes."""
    low, high = method.models
    count = max(low, 2) if high is None or high >= 2 else high
    base = model(0, dtype)
    if method.base == "source":
        count -= 1
    models = [model(i + 1, dtype) for i in range(count)]
    if method.base == "required":
        models = [jax.tree.map(nearby, base, one) for one in models]
    return models, base


def nearby(base: jax.Array, other: jax.Array) -> jax.Array:
    if not jnp.issubdtype(base.dtype, jnp.floating):
        return other
    return (base + 0.1 * other).astype(base.dtype)


def key(method: MergeMethod) -> jax.Array | None:
    return jax.random.key(3) if method.random else None


def sources(method: MergeMethod) -> int:
    models, base = inputs(method)
    return len(models) + (method.base == "source" and base is not None)


def sample(method: MergeMethod, seed: int = 0) -> dict[str, Any]:
    """A random point of the method's hyperparameters, float32."""
    rng = np.random.default_rng(seed)

    def draw(spec: Any) -> Any:
        if not isinstance(spec, Hyperparameter):
            return {name: draw(inner) for name, inner in spec.items()}
        low, high = spec.search or (spec.low, spec.high)
        shape = (sources(method),) if spec.scope == "model" else ()
        value = rng.uniform(low, high, shape)
        if spec.kind in ("flag", "index"):
            value = np.round(value)
        return jnp.asarray(value, jnp.float32)

    return {name: draw(spec) for name, spec in method.hyperparams.items()}


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    chex.assert_trees_all_equal_structs(a, b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(
            np.asarray(one, np.float64),
            np.asarray(other, np.float64),
            rtol=tolerance,
            atol=tolerance,
        )


@every_variant
def test_merging_once_equals_init_and_apply_jitted_or_not(method: MergeMethod) -> None:
    models, base = inputs(method)
    point = sample(method)
    once = jm.merge(method, models, base=base, key=key(method), **point)
    state = method.init(models, base)
    close(once, method.apply(state, point, key(method)))
    close(once, jax.jit(method.apply)(state, point, key(method)))

    @jax.jit
    def whole(models: Any, base: Any, point: Any) -> Any:
        return jm.merge(method, models, base=base, key=key(method), **point)

    close(once, whole(models, base, point))


@every_method
def test_a_vmapped_population_equals_a_loop_and_traces_once(method: MergeMethod) -> None:
    models, base = inputs(method)
    state = method.init(models, base)
    points = [sample(method, seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *points)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def population(state: Any, points: Any) -> Any:
        return jax.vmap(lambda p: method.apply(state, p, key(method)))(points)

    many = population(state, stacked)
    population(state, jax.tree.map(lambda x: x * 0.5, stacked))
    for i, point in enumerate(points):
        close(jm.tree.unstack(many)[i], method.apply(state, point, key(method)))


@every_method
def test_numbers_and_arrays_share_one_trace(method: MergeMethod) -> None:
    models, base = inputs(method)
    state = method.init(models, base)
    point = sample(method)
    method.apply(state, point, key(method))
    with jax.log_compiles(False):
        before = _compiled()
        method.apply(state, jax.tree.map(lambda x: x.tolist(), point), key(method))
        method.apply(state, jax.tree.map(np.asarray, point), key(method))
        assert _compiled() == before


def _compiled() -> int:
    from jaxmerge.methods import engine, measuring

    functions = (
        engine._apply_batch,
        measuring._whole_tensor,
        measuring._statistics,
        measuring._look_up,
    )
    return sum(function._cache_size() for function in functions)


@every_method
def test_gradients_are_finite(method: MergeMethod) -> None:
    models, base = inputs(method)
    point = sample(method)
    for sources_ in (models, [base] * len(models)):
        state = method.init(sources_, base)

        def objective(point: Any, state: Any = state) -> jax.Array:
            merged = method.apply(state, point, key(method))
            return sum(
                jnp.sum(jnp.square(x)) for x in jax.tree.leaves(merged) if x.dtype == jnp.float32
            )

        chex.assert_tree_all_finite(jax.grad(objective)(point))


@every_method
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_storage_dtype_is_kept_and_a_given_dtype_honoured(
    method: MergeMethod, dtype: Any
) -> None:
    models, base = inputs(method, dtype)
    merged = jm.merge(method, models, base=base, key=key(method))
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, base)
    wide = jm.merge(method, models, base=base, key=key(method), dtype=jnp.float32)
    assert wide["scalar"].dtype == wide["empty"].dtype == jnp.float32
    assert wide["steps"].dtype == jnp.int32


@every_method
def test_integers_and_booleans_come_from_the_base(method: MergeMethod) -> None:
    models, base = inputs(method)
    merged = jm.merge(method, models, base=base, key=key(method))
    np.testing.assert_array_equal(merged["steps"], base["steps"])
    np.testing.assert_array_equal(merged["mask"], base["mask"])
    assert merged["empty"].shape == (0, 3)


def extremes(method: MergeMethod) -> list[dict[str, Any]]:
    """Points at the bounds, at zero, and with weights of mixed signs that sum to zero."""

    def at(choose: Any, specs: Any) -> dict[str, Any]:
        return {
            name: choose(spec) if isinstance(spec, Hyperparameter) else at(choose, spec)
            for name, spec in specs.items()
        }

    def mixed(spec: Hyperparameter) -> Any:
        if spec.scope == "model" and spec.low < 0:
            return [(-1.0) ** i for i in range(sources(method))]
        return spec.high if spec.kind in ("flag", "index") else spec.default

    def low(spec: Hyperparameter) -> float:
        return spec.low if np.isfinite(spec.low) else 0.0

    def high(spec: Hyperparameter) -> float:
        return spec.high if np.isfinite(spec.high) else spec.default

    return [at(choose, method.hyperparams) for choose in (low, high, mixed)]


@every_variant
def test_degenerate_inputs_give_finite_results(method: MergeMethod) -> None:
    models, base = inputs(method)
    zero = jax.tree.map(jnp.zeros_like, base)
    negated = jax.tree.map(lambda x: -x if x.dtype == jnp.float32 else x, base)
    for sources_, base_ in (
        (models, base),
        ([base] * len(models), base),
        ([zero] * len(models), zero),
        ([negated] * len(models), base),
    ):
        state = method.init(sources_, base_)
        for point in extremes(method):
            chex.assert_tree_all_finite(method.apply(state, point, key(method)))


@every_method
def test_one_model_is_enough_where_the_method_allows_it(method: MergeMethod) -> None:
    models, base = inputs(method)
    if method.models[0] > 1:
        with pytest.raises(ValueError, match="takes"):
            jm.merge(method, models[:1], key=key(method))
        return
    chex.assert_tree_all_finite(jm.merge(method, models[:1], base=base, key=key(method)))


@every_method
def test_the_result_does_not_depend_on_names_of_containers_or_their_order(
    method: MergeMethod,
) -> None:
    models, base = inputs(method)

    def turned(tree: Any) -> Any:
        return dict(reversed(list(tree.items())))

    point = sample(method)
    straight = jm.merge(method, models, base=base, key=key(method), **point)
    other = jm.merge(method, list(map(turned, models)), base=turned(base), key=key(method), **point)
    close(straight, {name: other[name] for name in straight}, 0.0)


@every_method
def test_sharded_over_eight_devices_gives_the_same(method: MergeMethod) -> None:
    models, base = inputs(method)
    mesh = jax.make_mesh((8,), ("shards",), axis_types=(AxisType.Auto,))

    def place(x: jax.Array) -> jax.Array:
        split = x.ndim > 0 and x.shape[0] == 8
        return jax.device_put(
            x, NamedSharding(mesh, PartitionSpec("shards") if split else PartitionSpec())
        )

    point = sample(method)
    merged = jm.merge(method, models, base=base, key=key(method), **point)
    sharded_models, sharded_base = jax.tree.map(place, (models, base))
    close(merged, jm.merge(method, sharded_models, base=sharded_base, key=key(method), **point))
    state = method.init(sharded_models, sharded_base)
    close(merged, jax.jit(method.apply)(state, point, key(method)))


@every_method
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators_without_a_device(method: MergeMethod, platform: str) -> None:
    models, base = inputs(method)

    def whole(models: Any, base: Any, point: Any, key: Any) -> Any:
        return jm.merge(method, models, base=base, key=key, **point)

    exported = export.export(jax.jit(whole), platforms=[platform])(
        models, base, sample(method), key(method)
    )
    assert exported.platforms == (platform,)
    assert "callback" not in str(exported.mlir_module())


@every_method
def test_a_layout_gives_what_the_checkpoint_gives(method: MergeMethod) -> None:
    """Flax-like leaves, transposed and with layers stacked, merge like the flat checkpoint."""
    rng = np.random.default_rng(5)
    flat_trees = []
    for _ in range(len(inputs(method)[0]) + 1):
        flat_trees.append(
            {
                **{f"layers.{i}.w": rng.normal(size=(4, 6)).astype(np.float32) for i in range(3)},
                "conv.weight": rng.normal(size=(5, 2, 3, 3)).astype(np.float32),
                "nested/matrix": rng.normal(size=(3,)).astype(np.float32),
            }
        )
    layout = jm.tree.Layout(
        {
            "stack": jm.tree.TensorLayout(
                tuple(f"layers.{i}.w" for i in range(3)), axes=(1, 2, 0), shape=(4, 6), stacked=True
            ),
            "kernel": jm.tree.TensorLayout(("conv.weight",), axes=(3, 2, 0, 1)),
        }
    )

    def to_flax(flat: Any) -> Any:
        stack = np.stack([flat[f"layers.{i}.w"].reshape(2, 2, 6) for i in range(3)])
        return {
            "stack": jnp.asarray(stack.transpose(0, 3, 1, 2)),
            "kernel": jnp.asarray(flat["conv.weight"].transpose(2, 3, 1, 0)),
            "nested/matrix": jnp.asarray(flat["nested/matrix"]),
        }

    flat_base, *flat_models = flat_trees
    point = sample(method)
    if method.name == "choose":
        point["method"] = jnp.asarray(1.0)
    merged = jm.merge(method, flat_models, base=flat_base, key=key(method), **point)
    flax_models, flax_base = list(map(to_flax, flat_models)), to_flax(flat_base)
    arguments = {"base": flax_base, "key": key(method), "layout": layout, **point}
    close(to_flax(merged), jm.merge(method, flax_models, **arguments))
    state = method.init(flax_models, flax_base, layout=layout)
    close(to_flax(merged), method.apply(state, point, key(method)))


def test_constructors_are_cached_and_names_listed() -> None:
    assert jm.methods.ties() is jm.methods.ties(scope="model")
    assert jm.methods.ties(scope="tensor") is not jm.methods.ties()
    assert set(jm.methods.names()) >= {"linear", "task_arithmetic", "ties", "dare_linear", "slerp"}
    first = jm.methods.choose([jm.methods.linear(), jm.methods.ties()])
    assert first is jm.methods.choose([jm.methods.linear(), jm.methods.ties()])
