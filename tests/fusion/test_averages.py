"""Streaming averages: their formulas in NumPy, inside scans, over runs, and what they refuse."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxmerge as jm

STEPS = 9
FUSION = jm.fusion


def mean_of(models: np.ndarray, start: np.ndarray) -> np.ndarray:
    return models.mean(0) if len(models) else start


def ema_of(models: np.ndarray, start: np.ndarray, decay: float, debias: bool) -> np.ndarray:
    rates = (1.0 - decay) * decay ** np.arange(len(models))[::-1]
    total = np.tensordot(rates, models, 1)
    kept = decay ** len(models)
    return total / (1.0 - kept) if debias else total + kept * start


# Each average, and what it gives of the models seen so far [n, ...] and the parameters given to init.
AVERAGES: dict[str, tuple[Any, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "uniform": (FUSION.uniform_soup(), mean_of),
    "swa": (FUSION.swa(start=2, every=3), lambda x, x0: mean_of(x[2::3], x0)),
    "ema": (FUSION.ema(0.9), lambda x, x0: ema_of(x, x0, 0.9, True)),
    "ema from init": (
        FUSION.ema(0.75, debias=False),
        lambda x, x0: ema_of(x, x0, 0.75, False),
    ),
    "lawa": (FUSION.lawa(3), lambda x, x0: mean_of(x[-3:], x0)),
    "lawa of some": (
        FUSION.lawa(2, start=1, every=2),
        lambda x, x0: mean_of(x[1::2][-2:], x0),
    ),
}
every_average = pytest.mark.parametrize("name", AVERAGES)


def params(value: float = 0.0, dtype: Any = jnp.float32) -> dict[str, Any]:
    return {
        "layer": {"kernel": jnp.full((2, 3), value, dtype), "bias": jnp.full(3, -value, dtype)},
        "seen": jnp.asarray(int(value), jnp.int32),
        "on": jnp.asarray(value > 0),
    }


def averages_along(average: Any, start: Any, models: Any) -> Any:
    """The average after each of the models [steps, ...], from one scan."""

    def step(state: Any, model: Any) -> tuple[Any, Any]:
        state = average.update(state, model)
        return state, average.average(state)

    return jax.lax.scan(step, average.init(start), models)[1]


def assert_close(found: Any, wanted: np.ndarray, size: float) -> None:
    # Numbers below the normal ones may be flushed to 0.
    atol = 2e-6 * size + 1e-36
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=atol)


sequences = hypothesis.extra.numpy.arrays(
    np.float32, (STEPS, 2), elements=st.floats(-1e4, 1e4, width=32)
)


@every_average
def test_averages_equal_their_formulas_at_every_step(name: str) -> None:
    average, formula = AVERAGES[name]
    run = jax.jit(lambda start, models: averages_along(average, start, models))

    @hypothesis.given(models=sequences)
    @hypothesis.settings(max_examples=25)
    def check(models: np.ndarray) -> None:
        start = np.asarray([7.0, -7.0], np.float32)
        found = run(start, models)
        wide, size = models.astype(np.float64), float(np.abs(models).max()) + 7.0
        for step in range(STEPS):
            assert_close(found[step], formula(wide[: step + 1], start.astype(np.float64)), size)

    check()


@hypothesis.given(sequences, st.integers(0, STEPS + 1), st.integers(1, 4), st.floats(0, 0.99))
@hypothesis.settings(max_examples=25)
def test_traced_options_give_what_constants_give(
    models: np.ndarray, start: int, every: int, decay: float
) -> None:
    first = np.zeros(2, np.float32)
    swa, lawa, ema = _with_options(first, models, start, every, jnp.float32(decay))
    taken, size = models.astype(np.float64)[start::every], float(np.abs(models).max())
    assert_close(swa[-1], mean_of(taken, first), size)
    assert_close(lawa[-1], mean_of(taken[-2:], first), size)
    # The decay that was computed with, and the rounding of 1 - decay^t.
    wanted = ema_of(models.astype(np.float64), first, float(np.float32(decay)), True)
    assert_close(ema[-1], wanted, 2 * size)


@jax.jit
def _with_options(first: Any, models: Any, start: Any, every: Any, decay: Any) -> Any:
    averages = (
        FUSION.swa(start=start, every=every),
        FUSION.lawa(2, start=start, every=every),
        FUSION.ema(decay),
    )
    return [averages_along(average, first, models) for average in averages]


def test_a_decay_schedule_sees_the_number_of_earlier_updates() -> None:
    def schedule(step: Any) -> Any:
        return jnp.minimum(0.9, (1.0 + step) / (10.0 + step))

    models = np.random.default_rng(0).normal(size=(STEPS, 2)).astype(np.float32)
    found = averages_along(FUSION.ema(schedule), jnp.ones(2), jnp.asarray(models))
    total, weight = np.zeros(2), 0.0
    for step, model in enumerate(models.astype(np.float64)):
        decay = min(0.9, (1.0 + step) / (10.0 + step))
        total, weight = decay * total + (1 - decay) * model, decay * weight + 1 - decay
        assert_close(found[step], total / weight, 3.0)


def test_a_decay_near_one_keeps_its_rate() -> None:
    average = FUSION.ema(0.99999, debias=False)
    state = average.update(average.init(jnp.zeros(1)), jnp.ones(1))
    # 1 - 0.99999 in float32 is 1.0014e-5.
    np.testing.assert_allclose(average.average(state), [1e-5], rtol=1e-6)


@every_average
def test_inside_a_training_scan_as_in_a_python_loop(name: str) -> None:
    average, _ = AVERAGES[name]
    inputs = np.random.default_rng(0).normal(size=(STEPS, 4)).astype(np.float32)

    def loss(weights: Any, x: Any) -> Any:
        return (jnp.tanh(x @ weights["w"]) - 0.5) ** 2

    def step(carry: Any, x: Any) -> tuple[Any, None]:
        weights, state = carry
        weights = jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(loss)(weights, x))
        return (weights, average.update(state, weights)), None

    start = {"w": jnp.ones(4)}
    carry, _ = jax.lax.scan(step, (start, average.init(start)), inputs)
    weights, state = start, average.init(start)
    for x in inputs:
        (weights, state), _ = step((weights, state), x)
    chex.assert_trees_all_close(carry, (weights, state), atol=1e-6)
    chex.assert_trees_all_close(average.average(carry[1]), average.average(state), atol=1e-6)


@every_average
def test_before_any_update_the_average_is_what_init_was_given(name: str) -> None:
    average, _ = AVERAGES[name]
    given = params(3.0, jnp.bfloat16)
    found = average.average(average.init(given))
    chex.assert_trees_all_equal(found, given)
    chex.assert_trees_all_equal_dtypes(found, given)


@every_average
def test_equal_models_are_their_average_to_the_bit(name: str) -> None:
    average, _ = AVERAGES[name]
    model = jnp.asarray([0.1, 1 / 3, -2e5, 1e-30])
    found = averages_along(average, model, jnp.stack([model] * STEPS))
    np.testing.assert_array_equal(found, jnp.stack([model] * STEPS))


def test_bfloat16_models_are_averaged_in_float32() -> None:
    steps, decay = 400, 0.99
    models = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (steps, 1)), jnp.bfloat16)
    wide = np.asarray(models, np.float64)
    averages = (FUSION.uniform_soup(), FUSION.ema(decay))
    formulas = (wide.mean(0), ema_of(wide, wide[0], decay, True))
    rates = (lambda step: 1 / (step + 1), lambda step: 1 - decay)
    for average, wanted, rate in zip(averages, formulas, rates, strict=True):
        assert_rounded_once(averages_along(average, models[0], models)[-1], wanted)
        narrow = np.zeros(1, jnp.bfloat16)
        for step, model in enumerate(np.asarray(models)):
            narrow = narrow + (model - narrow) * np.asarray(rate(step), jnp.bfloat16)
        # The case tells the two apart.
        assert abs(float(narrow[0]) - wanted[0]) > 2 * 2.0**-7


def test_a_window_of_bfloat16_models_is_averaged_in_float32() -> None:
    # In bfloat16, the differences to the first would be rounded to multiples of 8.
    models = jnp.ones((200, 1), jnp.bfloat16).at[0].set(1200.0)
    found = averages_along(FUSION.lawa(200), models[0], models)[-1]
    assert_rounded_once(found, np.asarray([1 + 1199 / 200]))


def assert_rounded_once(found: Any, wanted: np.ndarray) -> None:
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2.0**-8)


@every_average
def test_integers_and_booleans_are_those_of_the_latest_model_taken(name: str) -> None:
    average, _ = AVERAGES[name]
    state = average.init(params())
    for step in range(8):
        state = average.update(state, params(step + 1.0))
    found = average.average(state)
    assert found["seen"].dtype == jnp.int32
    assert found["on"].dtype == jnp.bool_
    assert int(found["seen"]) == (6 if name == "swa" else 8)
    assert bool(found["on"])


@every_average
def test_a_step_is_traced_once_and_its_buffers_may_be_donated(name: str) -> None:
    average, _ = AVERAGES[name]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(model: Any, state: Any) -> tuple[Any, Any]:
        model = jax.tree.map(lambda leaf: ~leaf if leaf.dtype == bool else leaf + 1, model)
        return model, average.update(state, model)

    model = params(1.0)
    state = average.init(model)
    kept = average.average(state)
    for _ in range(4):
        model, state = step(model, state)
    chex.assert_trees_all_equal(kept, params(1.0))
    assert int(state.step) == 4


@every_average
def test_vmapped_over_runs_as_run_by_run(name: str) -> None:
    average, formula = AVERAGES[name]
    models = np.random.default_rng(1).normal(size=(2, STEPS, 3)).astype(np.float32)
    starts = np.ones((2, 3), np.float32)
    found = jax.vmap(lambda start, run: averages_along(average, start, run))(starts, models)
    for run in range(2):
        assert_close(found[run, -1], formula(models[run].astype(np.float64), starts[run]), size=5.0)


def test_decays_are_swept_by_vmap() -> None:
    models = np.random.default_rng(2).normal(size=(STEPS, 3)).astype(np.float32)
    decays = np.asarray([0.0, 0.5, 0.99], np.float32)
    found = jax.vmap(lambda d: averages_along(FUSION.ema(d), models[0], models)[-1])(decays)
    for decay, one in zip(decays.astype(np.float64), found, strict=True):
        assert_close(one, ema_of(models.astype(np.float64), models[0], decay, True), 5.0)


@pytest.mark.parametrize("name", [name for name in AVERAGES if name != "ema from init"])
def test_what_does_not_count_leaves_no_trace(name: str) -> None:
    average, _ = AVERAGES[name]
    state = average.init({"w": jnp.full(2, jnp.inf)})
    for step in range(STEPS):
        # The steps that the average leaves out.
        skipped = {"swa": step < 2 or step % 3 != 2, "lawa of some": step % 2 == 0}.get(name, False)
        state = average.update(state, {"w": jnp.full(2, jnp.nan if skipped else 3.0)})
    np.testing.assert_array_equal(average.average(state)["w"], [3.0, 3.0])


def test_sharded_models_stay_where_they_are() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    model = jax.device_put(jnp.arange(16.0), sharding)
    for average, _ in (AVERAGES["uniform"], AVERAGES["lawa"]):
        state = jax.jit(average.update)(average.init(model), model + 1)
        assert jax.tree.leaves(state.values)[0].sharding.spec[-1] == "x"
        found = average.average(state)
        assert found.sharding.is_equivalent_to(sharding, 1)
        np.testing.assert_array_equal(found, np.arange(16.0) + 1)


def test_any_tree_is_a_model() -> None:
    state = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    trees = [state, {"w": 1.0, "none": None, "empty": np.zeros((0, 2)), "key": jax.random.key(0)}]
    for tree in trees:
        for average in (FUSION.uniform_soup(), FUSION.lawa(2)):
            found = average.average(average.update(average.init(tree), tree))
            chex.assert_trees_all_equal_structs(found, tree)
            assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, tree)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"kernal": jnp.zeros(2), "n": jnp.zeros((), int)}, "kernal"),
    "additional": (
        {"kernel": jnp.zeros(2), "n": jnp.zeros((), int), "bias": jnp.zeros(2)},
        "'bias'",
    ),
    "shape": (
        {"kernel": jnp.zeros(3), "n": jnp.zeros((), int)},
        r"'kernel': init was given shape \[2\], the update has \[3\]",
    ),
    "kind": (
        {"kernel": jnp.zeros(2), "n": jnp.zeros(())},
        "'n': init was given integer numbers, the update has float32",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("name", ["uniform", "ema", "lawa"])
def test_other_tensors_than_those_of_init_are_refused_by_name(name: str, fault: str) -> None:
    average, _ = AVERAGES[name]
    wrong, message = WRONG[fault]
    state = average.init({"kernel": jnp.zeros(2), "n": jnp.zeros((), int)})
    with pytest.raises(ValueError, match=message):
        average.update(state, wrong)
    with pytest.raises(ValueError, match=message):
        jax.jit(average.update)(state, wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FUSION.swa(every=0), "swa needs every >= 1, found 0"),
        (lambda: FUSION.swa(start=-1), "swa needs start >= 0, found -1"),
        (lambda: FUSION.swa(every=1.5), r"swa takes one integer every, found 1\.5"),
        (lambda: FUSION.swa(every=jnp.arange(2)), "swa takes one integer every"),
        (lambda: FUSION.lawa(0), "lawa needs last >= 1, found 0"),
        (lambda: FUSION.lawa(2, every=jnp.int32(0)), "lawa needs every >= 1, found 0"),
        (lambda: FUSION.lawa(2, start=-2), "lawa needs start >= 0, found -2"),
        (lambda: FUSION.ema(1.0), r"ema needs 0 <= decay < 1, found 1\.0"),
        (lambda: FUSION.ema(jnp.float32(-0.5)), r"ema needs 0 <= decay < 1, found -0\.5"),
        (lambda: FUSION.ema(float("nan")), "ema needs 0 <= decay < 1, found nan"),
        (lambda: FUSION.ema(np.zeros(2)), r"ema takes a scalar decay, found shape \[2\]"),
    ],
)
def test_options_out_of_bounds_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
