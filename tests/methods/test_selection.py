"""Exact trimming: every route keeps what a stable sort keeps."""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmerge.methods.selection import (
    Selection,
    count,
    host,
    keep,
    kernel,
    key_bits,
    order,
    select,
    select_compiled,
    select_in_passes,
    select_over,
    select_rows_on_host,
    stream,
)

ROUTES = ["histogram", "blocks", "bisection"]
TYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
DISTRIBUTIONS = ["normal", "heavy", "ties", "zeros", "constant", "sorted", "special"]


def sample(distribution: str, shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = np.abs(rng.standard_normal(shape))
    if distribution == "heavy":
        values = values**9 / 1e3
    elif distribution == "ties":
        values = np.round(values * 2) / 2
    elif distribution == "zeros":
        values = values * (rng.random(shape) < 0.2)
    elif distribution == "constant":
        values = np.full(shape, 0.37)
    elif distribution == "sorted":
        values = np.sort(values, axis=None).reshape(shape)
    elif distribution == "special":
        kinds = np.array([np.nan, np.inf, 0.0, -0.0, 1e-40, 6e-8, 1.0])
        values = np.where(values > 0.7, kinds[rng.integers(0, kinds.size, shape)], values)
    return np.asarray(values).astype(dtype)


def kept(values: Sequence[np.ndarray], k: int) -> list[np.ndarray]:
    """The oracle: a stable descending sort of everything, NaN first."""
    flat = np.concatenate([np.abs(np.asarray(v, np.float64)).ravel() for v in values])
    flat = np.where(np.isnan(flat), np.inf, np.minimum(flat, 1e300))
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:k]] = True
    parts = np.split(mask, np.cumsum([v.size for v in values])[:-1])
    return [part.reshape(v.shape) for part, v in zip(parts, values, strict=True)]


def assert_keeps(values: np.ndarray, selection: Selection, k: int) -> None:
    mask = np.asarray(keep(jnp.asarray(values), selection))
    assert mask.sum() == min(k, values.size)
    np.testing.assert_array_equal(mask, kept([values], k)[0])


def counts_to_try(size: int) -> list[int]:
    return sorted({0, min(1, size), size // 3, size // 2 + 1, max(size - 1, 0), size})


# --- count


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_concrete_count_is_pythons(density: float, size: int) -> None:
    assert int(count(density, size)) == int(density * size)
    assert int(count(density, size, rounding="ceil")) == math.ceil(density * size)


@functools.partial(jax.jit, static_argnames="rounding")
def traced_count(density: jax.Array, size: jax.Array, rounding: str) -> jax.Array:
    return count(density, size, rounding=rounding)


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 1, width=32), st.integers(0, 2**32 - 1), st.sampled_from(["floor", "ceil"]))
def test_a_traced_count_equals_the_concrete_one(density: float, size: int, rounding: str) -> None:
    found = traced_count(np.float32(density), np.uint32(size), rounding)
    assert int(found) == int(count(np.float32(density), size, rounding=rounding))


def test_counts_round_as_double_precision_does_beyond_53_bits() -> None:
    rng = np.random.default_rng(0)
    size = 2**32 - 1 - 2 * rng.integers(0, 1000, 4000)
    # density * size is just below an integer: mantissa * size = -1, -2 or -3 modulo 2**24.
    below = rng.integers(1, 4, size.size)
    mantissa = np.array(
        [-b * pow(int(s), -1, 2**24) % 2**24 for b, s in zip(below, size, strict=True)]
    )
    density = (mantissa / 2**24).astype(np.float32)
    found = traced_count(density, size.astype(np.uint32), "floor")
    expected = [int(d * s) for d, s in zip(density.tolist(), size.tolist(), strict=True)]
    np.testing.assert_array_equal(found, np.array(expected))
    assert np.any(np.array(expected) * 2**24 > mantissa.astype(object) * size)


def test_counts_clip_the_density_and_take_nan_for_zero() -> None:
    densities = np.array([-1.0, -0.0, 1e-45, 0.5, 1.0, 1.5, np.inf, np.nan], np.float32)
    expected = [0, 0, 0, 3, 6, 6, 6, 0]
    assert count(densities, 6).tolist() == expected
    assert jax.jit(lambda d: count(d, 6))(densities).tolist() == expected
    assert jax.vmap(lambda d: count(d, 6))(jnp.asarray(densities)).tolist() == expected


def test_count_refuses_sizes_beyond_32_bits_and_unknown_roundings() -> None:
    with pytest.raises(ValueError, match="from 0 to 2\\*\\*32 - 1 was expected, found 4294967296"):
        count(0.5, 2**32)
    with pytest.raises(ValueError, match='"floor" or "ceil", found \'nearest\''):
        count(0.5, 4, rounding="nearest")  # type: ignore[arg-type]


# --- one tensor


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_route_keeps_what_a_stable_sort_keeps(distribution: str, dtype: type) -> None:
    values = sample(distribution, (5, 300, 2), dtype)
    device = jnp.asarray(values)
    positions = np.asarray(order(device))
    for k in counts_to_try(values.size):
        selection = select(values, k)
        assert_keeps(values, selection, k)
        for route in ROUTES:
            chex.assert_trees_all_equal(select_compiled(device, k, route=route), selection)
        survives = np.zeros(values.size, bool)
        survives[positions[: max(k, 0)]] = True
        chex.assert_trees_all_equal(keep(device, selection), survives.reshape(values.shape))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_host_route_is_exact_when_a_sample_brackets_the_threshold(distribution: str) -> None:
    for dtype in TYPES:
        values = sample(distribution, (200_003,), dtype)
        for k in [1, 2, 70_000, 150_001, 200_002]:
            assert_keeps(values, select(values, k), k)


@pytest.mark.parametrize("k", [1, 30, 90_000, 199_999])
def test_the_host_route_survives_a_sample_that_misses(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_DEVIATIONS", 0.0)
    monkeypatch.setattr(host, "_SAMPLE", 8)
    values = sample("normal", (200_000,), np.float32)
    assert_keeps(values, select(values, k), k)


@pytest.mark.parametrize("route", ["histogram", "blocks"])
@pytest.mark.parametrize("distribution", ["normal", "ties", "zeros"])
def test_large_arrays_are_cut_exactly(distribution: str, route: str) -> None:
    values = sample(distribution, (300_001,), np.float32)
    for k in [1, 100_000, 300_000]:
        selection = select_compiled(values, k, route=route)
        chex.assert_trees_all_equal(selection, select(values, k))
        assert_keeps(values, selection, k)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=16).map(abs), min_size=16, max_size=16), st.integers(0, 16))
def test_routes_agree_on_any_values(numbers: list[float], k: int) -> None:
    for dtype in (np.float32, np.float16):
        values = np.array(numbers, dtype)
        selection = select(values, k)
        assert_keeps(values, selection, k)
        chex.assert_trees_all_equal(select_compiled(values, k), selection)


def test_scalars_and_empty_arrays_are_selected_from() -> None:
    for k in (0, 1, 5):
        scalar = jnp.float32(2.0)
        for found in (select(scalar, k), select_compiled(scalar, k)):
            assert bool(keep(scalar, found)) == (k > 0)
        empty = jnp.zeros((3, 0), jnp.bfloat16)
        assert order(empty).shape == (0,)
        for found in (select(empty, k), select_compiled(empty, k)):
            assert keep(empty, found).shape == (3, 0)


def test_counts_outside_the_size_are_limited() -> None:
    values = sample("normal", (10,), np.float32)
    for k, expected in [(-3, 0), (11, 10), (2**32 - 1, 10)]:
        assert keep(values, select(values, k)).sum() == expected
        assert keep(values, select_compiled(values, k)).sum() == expected
    traced = jax.jit(lambda k: keep(values, select(values, k)).sum())
    assert [int(traced(k)) for k in (-3, 11)] == [0, 10]


def test_other_types_and_fractional_counts_are_refused() -> None:
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16 values .* found int32"):
        select(np.zeros(3, np.int32), 1)
    with pytest.raises(TypeError, match="an integer count k was expected, found float64"):
        select(np.zeros(3, np.float32), 0.5)


def test_chunks_are_kept_by_their_place_in_the_tensor() -> None:
    values = jnp.asarray(sample("ties", (50,), np.float32))
    selection = select(values, 20)
    index = jnp.arange(50, dtype=jnp.uint32)
    parts = [keep(values[i : i + 7], selection, index[i : i + 7]) for i in range(0, 50, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), keep(values, selection))


# --- under transformations


@pytest.mark.parametrize("route", ROUTES)
def test_vmap_over_models_and_counts_equals_a_loop(route: str) -> None:
    models = jnp.stack([sample(d, (40, 5), np.float32) for d in ("normal", "ties", "special")])
    ks = jnp.array([7, 120, 33])
    batched = jax.vmap(functools.partial(select_compiled, route=route))(models, ks)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], batched)
        chex.assert_trees_all_equal(one, select(np.asarray(models[i]), int(ks[i])))


def test_vmap_over_counts_alone_equals_a_loop() -> None:
    values = sample("ties", (30, 7), np.float32)
    ks = np.array([0, 7, 120, 210])
    batched = jax.vmap(select, in_axes=(None, 0))(values, ks)
    for i, k in enumerate(ks):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], batched)
        chex.assert_trees_all_equal(one, select(values, int(k)))


def test_the_default_route_and_orders_work_under_vmap() -> None:
    values = jnp.asarray(sample("ties", (3, 200), np.float32))
    ks = jnp.array([0, 57, 200])
    direct = jax.vmap(select)(values, ks)
    chex.assert_trees_all_equal(jax.vmap(order)(values), jnp.stack([order(v) for v in values]))
    masks = jax.vmap(keep)(values, direct)
    assert masks.sum(1).tolist() == [0, 57, 200]


def test_a_sweep_over_counts_traces_once() -> None:
    values = jnp.asarray(sample("normal", (64,), np.float32))

    @jax.jit
    @chex.assert_max_traces(1)
    def total(density: jax.Array) -> jax.Array:
        k = count(density, values.size)
        return jnp.sum(keep(values, select(values, k)))

    densities = np.linspace(0, 1, 9, dtype=np.float32)
    assert [int(total(d)) for d in densities] == [int(64 * d) for d in densities.tolist()]


def test_no_gradient_flows_through_the_selection() -> None:
    values = jnp.array([0.5, 2.0, 1.0])

    def loss(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keep(values, select(values, jnp.int32(2))), values, 0.0) ** 2)

    assert jax.jit(jax.grad(loss))(values).tolist() == [0.0, 4.0, 2.0]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_kernel_lowers_for_accelerators_without_callbacks(platform: str) -> None:
    def kernel(values: jax.Array, k: jax.Array) -> jax.Array:
        return keep(values, select_compiled(values, k))

    shapes = jax.ShapeDtypeStruct((64, 1000), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.uint32)
    text = export.export(jax.jit(kernel), platforms=[platform])(*shapes).mlir_module()
    assert "custom_call" not in text
    assert "scatter" not in text


@pytest.mark.parametrize(
    ("route", "spec"),
    [
        ("histogram", P("x")),
        ("histogram", P(None, "x")),
        ("histogram", P("x", "y")),
        ("bisection", P("x", "y")),
    ],
)
def test_sharded_arrays_give_the_same_and_are_not_gathered(route: str, spec: P) -> None:
    shape = (4, 2) if len(spec) == 2 and spec[0] else (8, 1)
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    values = sample("ties", (64, 48), np.float32)
    sharded = jax.device_put(values, NamedSharding(mesh, spec))
    kernel = jax.jit(lambda v, k: keep(v, select_compiled(v, k, route=route)))
    np.testing.assert_array_equal(kernel(sharded, 1000), kept([values], 1000)[0])
    program = kernel.lower(sharded, 1000).compile().as_text()
    # Partial counts may be gathered, [1, 4, 2] or so; the data, 64 x 48, may not.
    assert all(size <= 64 for size in gathered_sizes(program))


def gathered_sizes(program: str) -> list[int]:
    results = re.findall(r"= (.*) all-gather(?:-start)?\(", program)
    shapes = [shape for result in results for shape in re.findall(r"\[([\d,]*)\]", result)]
    return [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]


def test_the_search_for_gathers_finds_one() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(jnp.zeros((64, 48)), NamedSharding(mesh, P("x")))
    program = jax.jit(lambda v: jnp.sort(v, axis=None)).lower(sharded).compile().as_text()
    assert max(gathered_sizes(program)) == 64 * 48


def test_the_front_doors_take_sharded_arrays() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    values = sample("ties", (16, 12), np.float32)
    sharded = jax.device_put(values, NamedSharding(mesh, P("x")))
    chex.assert_trees_all_equal(select(sharded, 50), select(values, 50))
    chex.assert_trees_all_equal(select_over([sharded, sharded], 90), select_over([values] * 2, 90))


def test_large_arrays_are_counted_in_blocks_with_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_BLOCK", 16)
    # No other test has this many entries: none finds this program, compiled for the smaller block, among its own.
    values = sample("ties", (83,), np.float32)
    for k in range(0, 84, 7):
        chex.assert_trees_all_equal(select_compiled(values, k, route="blocks"), select(values, k))


# --- all tensors together


def model(distribution: str, types: Sequence[type]) -> list[np.ndarray]:
    shapes = [(4, 9), (30,), (4, 9), (), (0, 3), (30,), (2, 2, 5)]
    return [
        sample(distribution, shape, types[i % len(types)], seed=i) for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("types", [TYPES[:1], TYPES], ids=["f32", "mixed"])
@pytest.mark.parametrize("distribution", ["normal", "ties", "special", "constant"])
def test_all_tensors_together_are_selected_as_one(distribution: str, types: list[type]) -> None:
    values = [jnp.asarray(v) for v in model(distribution, types)]
    compiled = jax.jit(select_over)
    total = sum(v.size for v in values)
    for k in [0, 1, 2, 17, total // 2, total - 1, total, total + 9]:
        selections = select_over(values, k)
        masks = [keep(v, s) for v, s in zip(values, selections, strict=True)]
        chex.assert_trees_all_equal(masks, kept([np.asarray(v) for v in values], k))
        chex.assert_trees_all_equal(compiled(values, np.uint32(k)), selections)


def test_the_host_route_crosses_tensors_and_blocks() -> None:
    values = [sample("ties", (size,), np.float32, seed=size) for size in (90_000, 3, 70_001, 0)]
    for k in (1, 60_000, 140_000, 160_004):
        masks = [keep(v, s) for v, s in zip(values, select_over(values, k), strict=True)]
        chex.assert_trees_all_equal(masks, kept(values, k))


def test_models_beyond_32_bit_counts_are_refused() -> None:
    values = [jax.ShapeDtypeStruct((2**16, 2**14), jnp.float32)] * 4
    with pytest.raises(ValueError, match=r"at most 2\*\*32 - 1 entries .* found 4294967296"):
        jax.eval_shape(lambda values: select_over(values, 5), values)
    with pytest.raises(ValueError, match=r"at most 2\*\*31 - 1 entries .* \(65536, 32768\)"):
        jax.eval_shape(lambda v: select(v, 5), jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32))


def test_no_tensors_at_all_is_no_error() -> None:
    assert select_over([], 3) == []


# --- streams


def in_passes(
    tensors: dict[str, np.ndarray], counts: list[list[int]], chunk: int = 600
) -> tuple[dict[str, list[tuple[Selection, ...]]], int]:
    """What is selected from as many rankings of the same values as there are counts, and the number of passes."""
    made = 0

    def passes(
        look: stream.Look, only: stream.Only | None = None, at: stream.At | None = None
    ) -> Iterator[Any]:
        nonlocal made
        made += only is None
        for name, values in reversed(tensors.items()):
            for start in range(0, values.size, chunk):
                if only is None or only(name, start):
                    part = values[start : start + chunk]
                    part = part if at is None else part[at(name, start, part.size)]
                    yield look(name, start, [part] * len(counts))

    sizes = {name: values.size for name, values in tensors.items()}
    return select_in_passes(passes, counts, sizes), made


@pytest.mark.parametrize("few", [False, True], ids=["as it is", "small bins and samples"])
@pytest.mark.parametrize("distribution", ["normal", "heavy", "ties", "constant", "special"])
def test_passes_over_chunks_keep_what_the_whole_keeps(
    distribution: str, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if few:
        monkeypatch.setattr(stream, "_HELD", 40)
        monkeypatch.setattr(stream, "_BINS", 1 << 6)
        monkeypatch.setattr(stream, "_SAMPLES", (1 << 6, 1 << 8))
    sizes = {"c": 1200, "a": 3, "b": 4001}
    tensors = {
        name: sample(distribution, (size,), np.float32, seed=size) for name, size in sizes.items()
    }
    ks = [0, 1, 2, 1000, 2600, 5203, 5204, 5205]
    found, _ = in_passes(tensors, [[k] for k in ks])
    for i, k in enumerate(ks):
        masks = [keep(jnp.asarray(values), found[name][i][0]) for name, values in tensors.items()]
        chex.assert_trees_all_equal(masks, kept(list(tensors.values()), k))


def test_several_counts_of_one_ranking_are_selected_together() -> None:
    values = sample("ties", (2000,), np.float32)
    found, _ = in_passes({"w": values}, [[1500, 20]])
    for selection, k in zip(found["w"][0], (1500, 20), strict=True):
        chex.assert_trees_all_equal(keep(jnp.asarray(values), selection), *kept([values], k))


def test_a_sample_spares_a_pass_and_one_that_misses_costs_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "_SAMPLES", (1 << 12, 1 << 12))
    values = sample("normal", (1 << 14,), np.float32)
    _, made = in_passes({"w": values}, [[5000]])
    # A sample, and a count that finds the threshold.
    assert made == 2
    monkeypatch.setattr(stream, "_DEVIATIONS", 0.0)
    again, more = in_passes({"w": values}, [[16000]])
    assert more > 2
    chex.assert_trees_all_equal(keep(jnp.asarray(values), again["w"][0][0]), *kept([values], 16000))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("distribution", ["normal", "ties", "special", "constant"])
def test_rows_are_selected_from_each_by_its_own_count(distribution: str, dtype: type) -> None:
    rows = sample(distribution, (6, 50), dtype)
    counts = np.array([0, 1, 20, 49, 50, 99], np.uint32)
    found = select_rows_on_host(rows, counts)
    for row, k, threshold, cut in zip(rows, counts, found.thresholds, found.cuts, strict=True):
        assert_keeps(row, Selection(threshold, cut), int(k))


def test_keys_are_monotone_and_nan_is_the_largest() -> None:
    for dtype in TYPES:
        finite = np.sort(sample("heavy", (400,), dtype))
        keys = np.asarray(key_bits(jnp.asarray(finite))).astype(np.int64)
        np.testing.assert_array_equal(np.sign(np.diff(keys)), np.diff(finite) > 0)
        payloads = jnp.array([np.nan, -np.nan], dtype)
        assert np.unique(key_bits(payloads)).size == 1
