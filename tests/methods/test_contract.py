"""What every registered method owes, from one table.

Compiling is what these tests cost. All tests of a method therefore share their inputs and run in one process (see
`tests/conftest.py`), and what is compiled for one test alone sees few shapes.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxmerge as jm
from jaxmerge.methods import Gram, Hyperparameter, MergeMethod


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
            {"layers/0/w": "wide", "**": "rest"},
        ),
    ]


def table(methods: list[MergeMethod]) -> Any:
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


METHODS = [jm.methods.get(name)() for name in jm.methods.names()] + combinators()
VARIANTS = [method for name in jm.methods.names() for method in variants(name)[1:]]
every_variant = table(METHODS + VARIANTS)


def every_method(test: Any) -> Any:
    return pytest.mark.usefixtures("compiled_in_haste")(table(METHODS)(test))


@contextmanager
def haste() -> Iterator[None]:
    """Compiles in a third of the time, to programs that round every product: `a * b + c` is never fused."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def compiled_in_haste() -> Iterator[None]:
    with haste():
        yield


COMPILATIONS: list[float] = []
"""The seconds that each of this process took."""


def note_compilation(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILATIONS.append(seconds)


jax.monitoring.register_event_duration_secs_listener(note_compilation)


# Inputs -------------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What a method is given."""

    models: list[Any]
    base: Any
    extras: dict[str, Any]

    def map(self, change: Callable[[Any], Any]) -> "Inputs":
        """Changes every tree of parameters; Gram matrices stay as they are."""
        extras = {
            name: trees if are_grams(trees) else each(change, trees)
            for name, trees in self.extras.items()
        }
        return Inputs(each(change, self.models), change(self.base), extras)

    def map_grams(self, change: Callable[[Any], Any]) -> "Inputs":
        extras = {
            name: each(change, trees) if are_grams(trees) else trees
            for name, trees in self.extras.items()
        }
        return replace(self, extras=extras)

    def only(self, change: Callable[[Any], Any], *paths: str) -> "Inputs":
        """Changes every tree of parameters to one with fewer leaves, and keeps the Gram matrices of these paths."""
        return self.map(change).map_grams(
            lambda grams: {path: grams[path] for path in paths if path in grams}
        )


def each(change: Callable[[Any], Any], trees: Any) -> Any:
    return list(map(change, trees)) if isinstance(trees, list) else change(trees)


def are_grams(trees: Any) -> bool:
    leaves = jax.tree.leaves(trees, is_leaf=lambda x: isinstance(x, Gram))
    return any(isinstance(leaf, Gram) for leaf in leaves)


def model(seed: int, dtypes: Any = (jnp.float32, jnp.float32)) -> dict[str, Any]:
    """Two tensors of one shape, rows of one entry, a scalar, and what is carried over."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    first, second = dtypes
    return {
        "layers": [{"w": draw((8, 5), first)}, {"w": draw((8, 5), second)}],
        "narrow": draw((4, 1, 1, 1), first),
        "scalar": draw((), second),
        "empty": jnp.zeros((0, 3), first),
        "steps": jnp.asarray(7 + seed, jnp.int32),
        "mask": jnp.asarray([True, seed % 2 == 0]),
    }


def inputs(method: MergeMethod, dtypes: Any = (jnp.float32, jnp.float32)) -> Inputs:
    """Models, a base and extras that the method takes."""
    low, high = method.models
    count = max(low, 2) if high is None or high >= 2 else high
    base = model(0, dtypes)
    if method.base == "source":
        count -= 1
    models = [model(i + 1, dtypes) for i in range(count)]
    if method.base == "required":
        models = [jax.tree.map(nearby, base, one) for one in models]
    return Inputs(models, base, extras_for(method, models))


def extras_for(method: MergeMethod, models: list[Any], *, optional: bool = True) -> dict[str, Any]:
    """What the method needs beside the models: positive numbers like the parameters, Grams of the layers' sides."""
    count = len(models) + (method.base == "source")
    made: dict[str, Any] = {}
    for name, extra in method.extras.items():
        if not (extra.required or optional):
            continue
        make = gram_of if extra.kind == "gram" else positive
        trees = [make(extra, seed) for seed in range(count)]
        made[name] = trees if extra.per == "model" else trees[0]
    return made


def positive(_: Any, seed: int) -> Any:
    return jax.tree.map(lambda x: abs(x) if is_float(x) else x, model(20 + seed))


def gram_of(extra: Any, seed: int) -> dict[str, Gram]:
    """Of the two layers [8, 5], not of the other leaves."""
    rng = np.random.default_rng(20 + seed)
    size, axis = (5, 1) if extra.side == "inputs" else (8, 0)
    seen = [rng.normal(size=(4 * size, size)) for _ in range(2)]
    matrices = [jnp.asarray(x.T @ x / len(x), jnp.float32) for x in seen]
    return {f"layers/{i}/w": Gram(matrix, axes=(axis,)) for i, matrix in enumerate(matrices)}


def nearby(base: jax.Array, other: jax.Array) -> jax.Array:
    return (base + 0.1 * other).astype(base.dtype) if is_float(base) else other


def is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def key(method: MergeMethod) -> jax.Array | None:
    return jax.random.key(3) if method.random else None


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


def sources(method: MergeMethod) -> int:
    return len(subject(method).given.models) + (method.base == "source")


# What the tests of one method share ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Subject:
    """A method with inputs, and what was made of them."""

    method: MergeMethod
    given: Inputs

    @functools.cached_property
    def point(self) -> dict[str, Any]:
        return sample(self.method)

    @functools.cached_property
    def once(self) -> Any:
        return self.merge(self.given, **self.point)

    @functools.cached_property
    def state(self) -> Any:
        return self.init(self.given)

    @functools.cached_property
    def some(self) -> Inputs:
        """Leaves of two kinds, for programs that only one test compiles: the layers and the scalar."""
        return self.given.only(layers_and_scalar, *LAYERS)

    @functools.cached_property
    def program(self) -> Any:
        """Both ways to merge, as one compiled function of everything."""

        def both(given: Inputs, point: Any, key: Any) -> Any:
            once = self.merge(given, key=key, **point)
            return once, self.method.apply(self.init(given), point, key)

        return jax.jit(both)

    def merge(self, given: Inputs, **rest: Any) -> Any:
        rest = {"key": key(self.method), **rest}
        return jm.merge(self.method, given.models, base=given.base, extras=given.extras, **rest)

    def init(self, given: Inputs, **rest: Any) -> Any:
        return self.method.init(given.models, given.base, extras=given.extras, **rest)

    def apply(self, state: Any, point: Any) -> Any:
        return self.method.apply(state, point, key(self.method))

    def params(self, merged: Any) -> Any:
        """Without what belongs to each task."""
        return merged[0] if self.method.per_task else merged


@functools.cache
def subject(method: MergeMethod) -> Subject:
    return Subject(method, inputs(method))


LAYERS = ("layers/0/w", "layers/1/w")


def layers_and_scalar(tree: Any) -> Any:
    return {"layers": tree["layers"], "scalar": tree["scalar"]}


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


# Programs -----------------------------------------------------------------------------------------------------------


@every_variant
def test_merging_once_equals_init_and_apply_jitted_or_not(method: MergeMethod) -> None:
    it = subject(method)
    close(it.once, it.apply(it.state, it.point))
    given = it.given if method in METHODS else it.some
    expected = it.once if given is it.given else it.merge(given, **it.point)
    with haste():
        for merged in it.program(given, it.point, key(method)):
            close(expected, merged)


@every_method
def test_a_vmapped_population_equals_a_loop_and_traces_once(method: MergeMethod) -> None:
    it = subject(method)
    state = it.init(it.some)
    points = [sample(method, seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *points)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def population(state: Any, points: Any) -> Any:
        return jax.vmap(lambda p: it.apply(state, p))(points)

    many = population(state, stacked)
    population(state, jax.tree.map(lambda x: x * 0.5, stacked))
    for i, point in enumerate(points):
        close(jm.tree.unstack(many)[i], it.apply(state, point))


@every_method
def test_numbers_and_arrays_share_one_trace(method: MergeMethod) -> None:
    it = subject(method)
    it.apply(it.state, it.point)
    before = len(COMPILATIONS)
    it.apply(it.state, jax.tree.map(lambda x: x.tolist(), it.point))
    it.apply(it.state, jax.tree.map(np.asarray, it.point))
    assert len(COMPILATIONS) == before


@every_method
def test_gradients_are_finite(method: MergeMethod) -> None:
    it = subject(method)

    @jax.jit
    @jax.grad
    def slope(point: Any, state: Any) -> jax.Array:
        merged = it.params(it.apply(state, point))
        return sum(
            jnp.sum(jnp.square(x)) for x in jax.tree.leaves(merged) if x.dtype == jnp.float32
        )

    identical = replace(it.given, models=[it.given.base] * len(it.given.models))
    for state in (it.state, it.init(identical)):
        chex.assert_tree_all_finite(slope(it.point, state))


@every_method
def test_lowers_for_accelerators_without_a_device(method: MergeMethod) -> None:
    it = subject(method)
    platforms = ("cuda", "tpu")
    exported = export.export(it.program, platforms=platforms)(it.given, it.point, key(method))
    assert exported.platforms == platforms
    assert "callback" not in str(exported.mlir_module())


@every_method
def test_sharded_over_eight_devices_gives_the_same(method: MergeMethod) -> None:
    it = subject(method)
    mesh = jax.make_mesh((8,), ("shards",), axis_types=(AxisType.Auto,))

    def place(x: jax.Array) -> jax.Array:
        split = x.ndim > 0 and x.shape[0] == 8
        return jax.device_put(
            x, NamedSharding(mesh, PartitionSpec("shards") if split else PartitionSpec())
        )

    merged = it.merge(it.some, **it.point)
    sharded = jax.tree.map(place, it.some)
    close(merged, it.merge(sharded, **it.point))
    close(merged, it.apply(it.init(sharded), it.point))
    for compiled in it.program(sharded, it.point, key(method)):
        close(merged, compiled)


# Leaves -------------------------------------------------------------------------------------------------------------


@every_method
def test_the_storage_dtype_is_kept_and_a_given_dtype_honoured(method: MergeMethod) -> None:
    it = subject(method)
    half = inputs(method, (jnp.bfloat16, jnp.float16))
    some = half.only(lambda tree: {"layers": tree["layers"], "steps": tree["steps"]}, *LAYERS)
    merged = it.params(it.merge(some))
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, some.base)
    chex.assert_tree_all_finite(merged)
    for dtype in (None, jnp.float32):
        merged = it.params(jax.eval_shape(functools.partial(it.merge, dtype=dtype), half))
        expected = jax.tree.map(lambda x, to=dtype: x.astype(to) if is_float(x) else x, half.base)
        chex.assert_trees_all_equal_shapes_and_dtypes(merged, expected if dtype else half.base)


@every_method
def test_integers_and_booleans_come_from_the_base(method: MergeMethod) -> None:
    it = subject(method)
    merged, base = it.params(it.once), it.given.base
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
    it = subject(method)
    models, base, extras = it.given.models, it.given.base, it.given.extras
    zero = jax.tree.map(jnp.zeros_like, base)
    negated = jax.tree.map(lambda x: -x if x.dtype == jnp.float32 else x, base)
    nothing = jax.tree.map(jnp.zeros_like, extras)
    for sources_, base_ in (
        (models, base),
        ([base] * len(models), base),
        ([zero] * len(models), zero),
        ([negated] * len(models), base),
    ):
        for extras_ in [extras, nothing] if extras else [extras]:
            state = it.init(Inputs(sources_, base_, extras_))
            for point in extremes(method):
                chex.assert_tree_all_finite(it.apply(state, point))


@every_method
def test_one_model_is_enough_where_the_method_allows_it(method: MergeMethod) -> None:
    it = subject(method)
    models, base = it.given.models[:1], it.given.base
    if method.models[0] > 1:
        with pytest.raises(ValueError, match="takes"):
            jm.merge(method, models, key=key(method))
        return
    one = Inputs(models, base, extras_for(method, models, optional=False))
    some = one.only(lambda tree: {"layers": tree["layers"][:1]}, "layers/0/w")
    chex.assert_tree_all_finite(it.merge(some))


@every_method
def test_the_result_does_not_depend_on_names_of_containers_or_their_order(
    method: MergeMethod,
) -> None:
    it = subject(method)

    def turned(tree: Any) -> Any:
        return dict(reversed(list(tree.items())))

    other = it.merge(it.given.map(turned), **it.point)
    close(it.once, jax.tree.unflatten(jax.tree.structure(it.once), jax.tree.leaves(other)), 0.0)


@every_method
def test_a_layout_gives_what_the_checkpoint_gives(method: MergeMethod) -> None:
    """Flax-like leaves, transposed and with layers stacked, merge like the flat checkpoint."""
    it = subject(method)
    layout = jm.tree.Layout(
        {
            "stack": jm.tree.TensorLayout(LAYERS, axes=(1, 2, 0), shape=(8, 5), stacked=True),
            "kernel": jm.tree.TensorLayout(("narrow",), axes=(3, 2, 0, 1)),
        }
    )

    def to_flax(tree: Any) -> Any:
        split = [layer["w"].reshape(2, 4, 5) for layer in tree["layers"]]
        rest = {name: tree[name] for name in tree if name not in ("layers", "narrow")}
        return {
            "stack": jnp.stack([jnp.transpose(one, (2, 0, 1)) for one in split]),
            "kernel": jnp.transpose(tree["narrow"], (2, 3, 1, 0)),
            **rest,
        }

    def stacked_grams(grams: Any) -> Any:
        matrices = jnp.stack([grams[path].matrix for path in LAYERS])
        axes = {(1,): (0,), (0,): (1, 2)}[grams[LAYERS[0]].axes]
        return {"stack": Gram(matrices, axes=axes)}

    flax = it.given.map(to_flax).map_grams(stacked_grams)
    expected = to_flax(it.params(it.once))
    if method.per_task:
        per_task = it.once[1]
        expected = expected, replace(per_task, masks=jax.vmap(to_flax)(per_task.masks))
    close(expected, it.merge(flax, layout=layout, **it.point))
    close(expected, it.apply(it.init(flax, layout=layout), it.point))


def test_compilations_are_counted() -> None:
    before = len(COMPILATIONS)
    jax.jit(lambda x: x + 1)(0)
    assert len(COMPILATIONS) > before


def test_constructors_are_cached_and_names_listed() -> None:
    assert jm.methods.ties() is jm.methods.ties(scope="model")
    assert jm.methods.ties(scope="tensor") is not jm.methods.ties()
    assert set(jm.methods.names()) >= {"linear", "task_arithmetic", "ties", "dare_linear", "slerp"}
    first = jm.methods.choose([jm.methods.linear(), jm.methods.ties()])
    assert first is jm.methods.choose([jm.methods.linear(), jm.methods.ties()])
