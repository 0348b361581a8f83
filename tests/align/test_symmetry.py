"""The symmetry that is derived from programs: as free as it should be, and never freer."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.align import PermutationSpec

RNG = np.random.default_rng(0)


class Case(NamedTuple):
    """A model, and its nodes as (size, parents' sizes, whether fixed), sorted."""

    function: Callable[..., Any]
    params: Any
    inputs: Any
    nodes: list[tuple[int, tuple[int, ...], bool]]


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape) / np.sqrt(shape[0])


def around_one(*shape: int) -> np.ndarray:
    return 1 + 0.3 * RNG.standard_normal(shape)


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(vector, like.shape)


def layer_norm(params: Any, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    normed = centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
    return normed * along_last(params["g"], x) + along_last(params["b"], x)


def causal(scores: jax.Array) -> jax.Array:
    return jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)


def fused_attention(taking: str) -> Case:
    """GPT-2's block: one kernel for queries, keys and values, split as `taking` says, and a tied embedding."""
    width, heads, each, tokens = 12, 2, 6, 5

    def function(p: Any, ids: jax.Array) -> jax.Array:
        x = p["wte"][ids] + p["wpe"][None, : ids.shape[1]]
        h = layer_norm(p["ln"], x)
        fused = h @ p["qkv"] + along_last(p["qkv_b"], jnp.zeros((*x.shape[:2], 3 * width)))
        if taking == "split":
            q, k, v = (part.reshape(*x.shape[:2], heads, each) for part in jnp.split(fused, 3, -1))
        else:
            parts = fused.reshape(*x.shape[:2], 3, heads, each)
            q, k, v = (parts[:, :, i] for i in range(3))
        weights = jax.nn.softmax(causal(jnp.einsum("bthd,bshd->bhts", q, k)), -1)
        x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ p["out"]
        return x @ p["wte"].T

    params = {
        "wte": draw(7, width),
        "wpe": draw(tokens, width),
        "ln": {"g": around_one(width), "b": draw(width)},
        "qkv": draw(width, 3 * width),
        "qkv_b": draw(3 * width),
        "out": draw(width, width),
    }
    nodes = [(2, (), False), (6, (2,), False), (6, (2,), False), (12, (), False)]
    return Case(function, params, RNG.integers(0, 7, (2, tokens)), nodes)


def grouped_query_attention() -> Case:
    width, groups, queries, each, tokens = 12, 2, 3, 4, 5

    def rotate(x: jax.Array) -> jax.Array:
        angles = np.arange(tokens)[:, None] * 10.0 ** -np.arange(each // 2)
        shape = (1, tokens, *(1,) * (x.ndim - 3), each)
        cos, sin = (
            jnp.broadcast_to(np.concatenate([f(angles)] * 2, -1).reshape(shape), x.shape)
            for f in (np.cos, np.sin)
        )
        half = jnp.concatenate([-x[..., each // 2 :], x[..., : each // 2]], -1)
        return x * cos + half * sin

    def function(p: Any, ids: jax.Array) -> jax.Array:
        x = p["embed"][ids]
        q = rotate((x @ p["q"]).reshape(*x.shape[:2], groups * queries, each))
        k = rotate((x @ p["k"]).reshape(*x.shape[:2], groups, each))
        v = (x @ p["v"]).reshape(*x.shape[:2], groups, each)
        k, v = (jnp.repeat(one, queries, axis=2) for one in (k, v))
        weights = jax.nn.softmax(causal(jnp.einsum("bthd,bshd->bhts", q, k)), -1)
        x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*x.shape[:2], -1) @ p["o"]
        x = x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
        return x @ p["head"]

    inner = groups * queries * each
    params = {
        "embed": draw(7, width),
        "q": draw(width, inner),
        "k": draw(width, groups * each),
        "v": draw(width, groups * each),
        "o": draw(inner, width),
        "gate": draw(width, 10),
        "up": draw(width, 10),
        "down": draw(10, width),
        "head": draw(width, 7),
    }
    nodes = [
        (2, (), False),
        (3, (2,), False),
        (4, (2,), False),
        (10, (), False),
        (12, (), False),
    ]
    return Case(function, params, RNG.integers(0, 7, (2, tokens)), nodes)


def convolve(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def group_norm_and_flatten() -> Case:
    def norm(x: jax.Array, g: jax.Array, b: jax.Array) -> jax.Array:
        y = x.reshape(*x.shape[:-1], 4, -1)
        y = y - jnp.mean(y, (1, 2, 4), keepdims=True)
        y = y / jnp.sqrt(jnp.mean(y**2, (1, 2, 4), keepdims=True) + 1e-5)
        return y.reshape(x.shape) * along_last(g, x) + along_last(b, x)

    def function(p: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(norm(convolve(x, p["stem"]), p["g0"], p["b0"]))
        h = jax.nn.relu(norm(convolve(x, p["c1"]), p["g1"], p["b1"]))
        x = x + convolve(h, p["c2"])
        return x.reshape(x.shape[0], -1) @ p["dense"]

    params = {
        "stem": draw(3, 3, 3, 12),
        "g0": around_one(12),
        "b0": draw(12),
        "c1": draw(3, 3, 12, 8),
        "g1": around_one(8),
        "b1": draw(8),
        "c2": draw(3, 3, 8, 12),
        "dense": draw(16 * 12, 5),
    }
    nodes = [(2, (4,), False), (3, (4,), False), (4, (), False), (4, (), False)]
    return Case(function, params, draw(2, 4, 4, 3), nodes)


def depthwise_grouped_and_pooled() -> Case:
    def function(p: Any, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(convolve(x, p["stem"]))
        x = jax.nn.relu(convolve(x, p["depthwise"], 12))
        x = jax.nn.relu(convolve(x, p["grouped"], 3))
        window = (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
        return jnp.mean(x, (1, 2)) @ p["dense"]

    params = {
        "stem": draw(3, 3, 3, 12),
        "depthwise": draw(3, 3, 1, 12),
        "grouped": draw(3, 3, 4, 12),
        "dense": draw(12, 5),
    }
    nodes = [(3, (), False), (4, (3,), False), (4, (3,), False)]
    return Case(function, params, draw(2, 4, 4, 3), nodes)


def experts() -> Case:
    def function(p: Any, x: jax.Array) -> jax.Array:
        h = x @ p["in"]
        gate = jax.nn.softmax(h @ p["router"], -1)
        u = jnp.tanh(jnp.einsum("bd,edf->bef", h, p["up"]))
        return jnp.einsum("be,bed->bd", gate, jnp.einsum("bef,efd->bed", u, p["down"])) @ p["out"]

    params = {
        "in": draw(5, 8),
        "router": draw(8, 4),
        "up": draw(4, 8, 6),
        "down": draw(4, 6, 9),
        "out": draw(9, 3),
    }
    nodes = [(4, (), False), (6, (4,), False), (8, (), False), (9, (), False)]
    return Case(function, params, draw(2, 5), nodes)


def scanned_layers() -> Case:
    def function(p: Any, x: jax.Array) -> jax.Array:
        def body(h: jax.Array, layer: Any) -> Any:
            u = h @ layer["w1"]
            return h + jnp.tanh(u + along_last(layer["b1"], u)) @ layer["w2"], jnp.sum(h)

        h, sums = jax.lax.scan(body, x @ p["in"], p["layers"])
        return h @ p["out"] + jnp.sum(sums)

    layers = {"w1": draw(4, 8, 6), "b1": draw(4, 6), "w2": draw(4, 6, 8)}
    params = {"in": draw(5, 8), "layers": layers, "out": draw(8, 3)}
    return Case(function, params, draw(2, 5), [(4, (), True), (6, (4,), False), (8, (), False)])


def recurrent() -> Case:
    def function(p: Any, x: jax.Array) -> jax.Array:
        def step(h: jax.Array, t: jax.Array) -> Any:
            return jnp.tanh(t @ p["wx"] + h @ p["wh"]), None

        h, _ = jax.lax.scan(step, jnp.zeros((x.shape[0], 7)), jnp.swapaxes(x, 0, 1))
        return h @ p["out"]

    params = {"wx": draw(3, 7), "wh": draw(7, 7), "out": draw(7, 2)}
    return Case(function, params, draw(2, 4, 3), [(7, (), False)])


def loops_and_branches() -> Case:
    def function(p: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ p["in"])
        h = jax.lax.while_loop(
            lambda h: jnp.sum(h) < 3, lambda h: h + along_last(p["b"] ** 2, h), h
        )
        h = jax.lax.cond(jnp.sum(h) > 0, lambda h: h * 2, lambda h: h + along_last(p["c"], h), h)
        return h @ p["out"]

    params = {"in": draw(3, 6), "b": around_one(6), "c": draw(6), "out": draw(6, 2)}
    return Case(function, params, draw(4, 3), [(6, (), False)])


CASES = {
    "fused attention, split": fused_attention("split"),
    "fused attention, reshaped": fused_attention("reshaped"),
    "grouped-query attention": grouped_query_attention(),
    "group norm and flatten": group_norm_and_flatten(),
    "depthwise, grouped and pooled": depthwise_grouped_and_pooled(),
    "experts": experts(),
    "scanned layers": scanned_layers(),
    "recurrent": recurrent(),
    "loops and branches": loops_and_branches(),
}


@pytest.fixture
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def sizes(spec: PermutationSpec) -> list[tuple[int, tuple[int | None, ...], bool]]:
    return sorted(
        (node.size or 0, tuple(spec.node(p).size for p in node.parents), node.fixed)
        for node in spec.nodes
    )


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", CASES)
def test_the_derived_group_is_the_known_one_and_changes_nothing(name: str) -> None:
    case = CASES[name]
    params, inputs = jax.tree.map(jnp.asarray, (case.params, case.inputs))
    spec = jm.align.symmetry(case.function, params, inputs)
    assert sizes(spec) == case.nodes
    change = jm.align.verify(spec, case.function, params, inputs, jax.random.key(0), trials=3)
    assert change < 1e-12


def test_what_the_program_tells_apart_stays_fixed() -> None:
    weights = jnp.arange(1.0, 5.0)

    def function(p: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ p["in"])
        return jnp.cumsum(h, -1) @ p["a"] + (h * along_last(weights, h)) @ p["b"]

    params = {"in": jnp.ones((3, 4)), "a": jnp.ones((4, 2)), "b": jnp.ones((4, 2))}
    assert jm.align.symmetry(function, params, jnp.ones((2, 3))).nodes == ()


def test_an_unknown_operation_costs_freedom_only() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        h = x @ p["in"]
        return jnp.abs(jnp.fft.fft(h @ p["mid"])) @ p["out"]

    params = {"in": jnp.ones((3, 4)), "mid": jnp.ones((4, 4)), "out": jnp.ones((4, 2))}
    spec = jm.align.symmetry(function, params, jnp.ones((2, 3)))
    assert [node.name for node in spec.nodes] == ["in"]


def test_roles_say_who_makes_units_and_who_reads_them() -> None:
    case = CASES["fused attention, split"]
    spec = jm.align.symmetry(case.function, case.params, case.inputs)

    def roles(path: str) -> list[str | None]:
        return [axis and axis.role for axis in spec.binding(path).axes]

    assert roles("qkv") == ["in", "out"]
    assert roles("qkv_b") == ["norm"]
    assert roles("wte") == [None, "both"]
    assert roles("wpe") == [None, "out"]


def test_running_statistics_are_told_by_their_path() -> None:
    def function(p: Any, x: jax.Array) -> jax.Array:
        h = x @ p["params"]["in"]
        return (h - along_last(p["batch_stats"]["mean"], h)) @ p["params"]["out"]

    params = {
        "params": {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))},
        "batch_stats": {"mean": jnp.ones(4)},
    }
    spec = jm.align.symmetry(function, params, jnp.ones((2, 3)))
    (axis,) = spec.binding("batch_stats/mean").axes
    assert axis is not None
    assert axis.role == "stat"


def test_shapes_are_enough() -> None:
    case = CASES["scanned layers"]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), case.params)
    x = jax.ShapeDtypeStruct(case.inputs.shape, jnp.float32)
    derived = jm.align.symmetry(case.function, shapes, x)
    assert derived == jm.align.symmetry(case.function, case.params, case.inputs)
