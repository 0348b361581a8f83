"""The program of a data flow, beside a loop over layers in float64 NumPy."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxmerge.search.dataflow.program import neighbours, run
from jaxmerge.search.dataflow.scales import HIDDEN, factors, scale_function
from jaxmerge.search.dataflow.slots import Slots, slots_of

SLOTS = Slots((2, 3), repeats=3)
WIDTH = 4
BOUNDS = (0.5, 4.0)

Layers = dict[str, np.ndarray]


def layer_fn(layer: Any, hidden: jax.Array, shift: jax.Array) -> jax.Array:
    return hidden + jnp.tanh(hidden @ layer["kernel"] + layer["bias"][None] + shift)


def expected(layers: Layers, on: Any, scale: Any, hidden: np.ndarray, shift: float) -> np.ndarray:
    """The same by a loop: `scale(previous or None, current, slot)`."""
    hidden, previous = hidden.astype(np.float64), None
    for slot in range(len(on)):
        if on[slot]:
            current = slot % SLOTS.depth
            hidden = hidden * scale(previous, current, slot)
            inner = hidden @ layers["kernel"][current].astype(np.float64)
            hidden = hidden + np.tanh(inner + layers["bias"][current] + shift)
            previous = current
    return hidden


@pytest.fixture(scope="module")
def layers() -> Layers:
    rng = np.random.default_rng(0)
    kernels = rng.normal(0, 0.4, (SLOTS.depth, WIDTH, WIDTH)).astype(np.float32)
    return {"kernel": kernels, "bias": rng.normal(0, 0.1, (SLOTS.depth, WIDTH)).astype(np.float32)}


HIDDEN_STATES = np.random.default_rng(1).normal(0, 1, (3, WIDTH)).astype(np.float32)
SHIFT = 0.25


@jax.jit
def by_slots(layers: Any, on: jax.Array, scales: jax.Array) -> jax.Array:
    scale = scale_function("slots", SLOTS, scales, BOUNDS)
    return run(layer_fn, layers, on, scale, jnp.asarray(HIDDEN_STATES), jnp.asarray(SHIFT))


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    on = rng.random(SLOTS.count) < 0.5
    return on, rng.uniform(0.5, 2, SLOTS.count).astype(np.float32)


@jax.jit
def skipping(layers: Any, on: jax.Array, scales: jax.Array) -> jax.Array:
    scale = scale_function("slots", SLOTS, scales, BOUNDS)
    hidden = jnp.asarray(HIDDEN_STATES)
    return run(layer_fn, layers, on, scale, hidden, jnp.asarray(SHIFT), skip=True)


@pytest.mark.parametrize("seed", range(4))
def test_slots_run_in_a_row_what_is_on(layers: Layers, seed: int) -> None:
    on, scales = draw(seed)
    wanted = expected(layers, on, lambda _, __, slot: scales[slot], HIDDEN_STATES, SHIFT)
    np.testing.assert_allclose(by_slots(layers, on, scales), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(skipping(layers, on, scales), wanted, rtol=1e-4, atol=1e-5)


def test_nothing_on_lets_the_hidden_states_pass(layers: Layers) -> None:
    off = np.zeros(SLOTS.count, bool)
    found = by_slots(layers, off, np.full(SLOTS.count, 7, np.float32))
    np.testing.assert_array_equal(found, HIDDEN_STATES)


def test_scales_of_slots_that_are_off_change_nothing(layers: Layers) -> None:
    on, scales = draw(5)
    others = np.where(on, scales, np.float32(123))
    np.testing.assert_array_equal(by_slots(layers, on, scales), by_slots(layers, on, others))
    assert not np.array_equal(by_slots(layers, on, scales), by_slots(layers, on, 1.1 * scales))


def test_a_population_is_what_its_candidates_are(layers: Layers) -> None:
    drawn = [draw(seed) for seed in range(6)]
    on, scales = (np.stack(parts) for parts in zip(*drawn, strict=True))
    together = jax.jit(jax.vmap(by_slots, in_axes=(None, 0, 0)))(layers, on, scales)
    for i in range(len(drawn)):
        np.testing.assert_allclose(
            together[i], by_slots(layers, on[i], scales[i]), rtol=1e-5, atol=1e-5
        )


def test_a_population_shares_the_weights(layers: Layers) -> None:
    population = 11

    def shapes(jaxpr: Any) -> set[tuple[int, ...]]:
        found: set[tuple[int, ...]] = set()
        for equation in jaxpr.eqns:
            found |= {variable.aval.shape for variable in equation.outvars}
            for inner in jaxprs_in_params(equation.params):
                found |= shapes(inner)
        return found

    on = np.ones((population, SLOTS.count), bool)
    scales = np.ones((population, SLOTS.count), np.float32)
    program = jax.make_jaxpr(jax.vmap(by_slots, in_axes=(None, 0, 0)))(layers, on, scales)
    found = shapes(program.jaxpr)
    assert (population, *HIDDEN_STATES.shape) in found
    assert (WIDTH, WIDTH) in found
    assert (population, WIDTH, WIDTH) not in found


def test_gradients_reach_the_scales_that_count(layers: Layers) -> None:
    on, scales = draw(2)
    gradient = jax.grad(lambda scales: jnp.sum(by_slots(layers, on, scales)))(scales)
    np.testing.assert_array_equal(np.asarray(gradient) != 0, on)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_population_lowers_for(layers: Layers, platform: str) -> None:
    on, scales = (np.stack([part] * 3) for part in draw(0))
    program = jax.jit(jax.vmap(by_slots, in_axes=(None, 0, 0)))
    exported = jax.export.export(program, platforms=[platform])(layers, on, scales)
    assert exported.platforms == (platform,)
    assert exported.out_avals[0].shape == (3, *HIDDEN_STATES.shape)


def pair_values(seed: int) -> np.ndarray:
    shape = (SLOTS.depth, SLOTS.depth)
    return np.random.default_rng(seed).uniform(0.5, 2, shape).astype(np.float32)


def network_values(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, HIDDEN), "bias": (HIDDEN,), "out": (HIDDEN,)}
    return {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def network(values: dict[str, np.ndarray], previous: int, current: int, slot: int) -> float:
    places = np.array([previous / SLOTS.depth, current / SLOTS.depth, slot / SLOTS.count])
    hidden = np.tanh(places @ values["kernel"].astype(np.float64) + values["bias"])
    out = np.tanh(hidden @ values["out"].astype(np.float64))
    low, high = np.log(BOUNDS)
    return float(np.exp(out * (high if out >= 0 else -low)))


@pytest.mark.parametrize("form", ["pairs", "network"])
def test_scales_between_layers_depend_on_both(layers: Layers, form: Any) -> None:
    on, _ = draw(7)
    values: Any = pair_values(3) if form == "pairs" else network_values(3)

    def wanted(previous: int | None, current: int, slot: int) -> float:
        if previous is None:
            return 1.0
        if form == "pairs":
            return float(values[previous, current])
        return network(values, previous, current, slot)

    @jax.jit
    def program(layers: Any, on: jax.Array, values: Any) -> tuple[jax.Array, jax.Array]:
        scale = scale_function(form, SLOTS, values, BOUNDS)
        hidden = jnp.asarray(HIDDEN_STATES)
        return run(layer_fn, layers, on, scale, hidden, jnp.asarray(SHIFT)), factors(
            scale, SLOTS, on
        )

    found, each = program(layers, on, values)
    reference = expected(layers, on, wanted, HIDDEN_STATES, SHIFT)
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5)
    taken = np.flatnonzero(on)
    previous = [None, *(int(slot) % SLOTS.depth for slot in taken[:-1])]
    along = [wanted(p, int(t) % SLOTS.depth, int(t)) for p, t in zip(previous, taken, strict=True)]
    np.testing.assert_allclose(np.asarray(each)[taken], along, rtol=1e-5)
    assert len(set(np.round(along, 4))) > 3
    np.testing.assert_array_equal(np.asarray(each)[~on], 1)


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_are_those_that_run_one_after_the_other(seed: int) -> None:
    on, _ = draw(seed)
    wanted = np.zeros((SLOTS.depth, SLOTS.depth), bool)
    taken = np.flatnonzero(on) % SLOTS.depth
    wanted[taken[:-1], taken[1:]] = True
    np.testing.assert_array_equal(neighbours(jnp.asarray(on), SLOTS.depth), wanted)


def test_slots_that_do_not_fit_the_layers_are_refused(layers: Layers) -> None:
    with pytest.raises(ValueError, match="7 slots are no multiple of 5 layers"):
        run(layer_fn, layers, jnp.ones(7, bool), None, HIDDEN_STATES, 0.0)


def test_a_layer_that_changes_the_shape_is_refused(layers: Layers) -> None:
    def wider(layer: Any, hidden: jax.Array) -> jax.Array:
        return jnp.concatenate([hidden, hidden], axis=1)

    on = jnp.ones(SLOTS.count, bool)
    with pytest.raises(ValueError, match=r"given float32 \[3, 4\] and returns float32 \[3, 8\]"):
        run(wider, layers, on, None, HIDDEN_STATES)
    with pytest.raises(ValueError, match="returns one array"):
        run(lambda layer, hidden: (hidden, hidden), layers, on, None, HIDDEN_STATES)


@pytest.mark.parametrize(
    ("tree", "sources", "message"),
    [
        ({"a": np.zeros((2, 3)), "b": np.zeros(3)}, None, r"'a' has shape \[2, 3\], 'b' has \[3\]"),
        ({"a": np.zeros(2), "b": np.zeros(())}, None, r"'b' has \[\]"),
        ({}, None, "no arrays"),
        ({"a": np.zeros((5, 2))}, [2, 2], r"\(2, 2\) have 4 layers, but there are 5"),
        ({"a": np.zeros((5, 2))}, [5, 0], "a layer or more"),
    ],
)
def test_rows_that_are_none_are_refused(tree: Any, sources: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slots_of(tree, sources, 2)
