"""Searches through data flow: what they find, that they compile once, and a decoder from end to end."""

from dataclasses import replace
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.models import (
    Decoder,
    DecoderConfig,
    LayerKind,
    along,
    in_a_row,
    layer_function,
    layers_of,
)
from jaxmerge.search.dataflow.searching import Flow
from jaxmerge.search.dataflow.slots import Slots
from jaxmerge.search.dataflow.spaces import flow_space

# Layers that turn a point of the plane by these angles: the best path is a sum of angles.
ANGLES = jnp.array([0.2, 0.5, -0.9, 1.3])
TARGET = 0.2 + 0.5 + 1.3 + 0.5
BOUNDS = (0.5, 2.0)


def turn(layer: Any, hidden: jax.Array) -> jax.Array:
    cosine, sine = jnp.cos(layer["angle"]), jnp.sin(layer["angle"])
    return jnp.stack([cosine * hidden[0] - sine * hidden[1], sine * hidden[0] + cosine * hidden[1]])


def likeness(flow: Any, key: jax.Array, target: jax.Array) -> jax.Array:
    """Minus the distance to the point of length 1.5 at an angle."""
    wanted = 1.5 * jnp.stack([jnp.cos(target), jnp.sin(target)])
    return -jnp.sum((flow(jnp.array([1.0, 0.0])) - wanted) ** 2)


def search(**options: Any) -> Any:
    given = {
        "repeats": 2,
        "population": 24,
        "generations": 40,
        "args": (jnp.asarray(TARGET),),
        "key": jax.random.key(0),
    }
    return jm.search.dataflow(turn, {"angle": ANGLES}, likeness, **{**given, **options})


def score_of(path: Any) -> float:
    """The score of a path by itself, in NumPy."""
    angle = sum(float(ANGLES[layer]) for layer in path.layers)
    length = float(np.prod(path.scales)) if path.scales else 1.0
    found = length * np.array([np.cos(angle), np.sin(angle)])
    wanted = 1.5 * np.array([np.cos(TARGET), np.sin(TARGET)])
    return -float(np.sum((found - wanted) ** 2))


@pytest.mark.parametrize(
    ("form", "strategy"), [("slots", "catcma"), ("pairs", "catcma"), ("network", "cma_es")]
)
def test_a_search_finds_layers_and_scales(form: Any, strategy: str) -> None:
    found = search(scales=form, strategy=strategy)
    assert found.evolution.fitness == pytest.approx(-score_of(found.path), abs=1e-4)
    assert score_of(found.path) > -0.05
    assert found.path == found.flow.path(found.evolution.best)


def test_several_scores_give_a_front_of_paths() -> None:
    def both(flow: Any, key: jax.Array) -> jax.Array:
        hidden = flow(jnp.array([1.0, 0.0]))
        return jnp.stack([hidden[0], hidden[1]])

    found = jm.search.dataflow(
        turn,
        {"angle": ANGLES},
        both,
        repeats=2,
        scales="none",
        objectives=2,
        strategy="nsga2",
        population=16,
        generations=5,
        key=jax.random.key(0),
    )
    assert len(found.paths) == len(found.evolution.fitness) > 1
    for path, fitness in zip(found.paths, found.evolution.fitness, strict=True):
        angle = sum(float(ANGLES[layer]) for layer in path.layers)
        np.testing.assert_allclose(fitness, [-np.cos(angle), -np.sin(angle)], atol=1e-5)


def test_what_does_not_count_does_not_move_the_distribution() -> None:
    # Only slot 0 is ever on, so that no other scale says anything.
    chances = np.zeros(8)
    chances[0] = 1.0
    space = flow_space(Slots((4,), 2), "slots", probability=chances)
    flow = Flow(turn, likeness, Slots((4,), 2), "slots", BOUNDS)
    strategy = jm.search.strategy("catcma", 24, space)
    state = strategy.init(
        jax.random.key(0), space.initial_genome(), params := strategy.default_params
    )
    population, state = strategy.ask(jax.random.key(1), state, params)
    population = population.at[:, :8].set(space.initial_genome()[None, :8])
    args = ({"angle": ANGLES}, jnp.asarray(TARGET))
    fitness = jax.vmap(lambda g: flow(space.decode(g), jax.random.key(2), *args))(population)
    after, _ = strategy.tell(jax.random.key(3), population, fitness, state, params)
    moved = np.abs(np.asarray(after.gaussian.mean) - 0.5)
    assert moved[0] > 1e-3
    np.testing.assert_allclose(moved[1:], 0, atol=1e-6)


def test_a_search_is_traced_once_and_other_weights_compile_nothing() -> None:
    calls = 0

    def counted(layer: Any, hidden: jax.Array) -> jax.Array:
        nonlocal calls
        calls += 1
        return turn(layer, hidden)

    slots = Slots((4,), 2)
    point = {"on": jnp.ones(8, bool), "scale": jnp.ones(8)}
    flow = Flow(counted, likeness, slots, "slots", BOUNDS)
    jax.make_jaxpr(flow)(point, jax.random.key(0), {"angle": ANGLES}, jnp.asarray(TARGET))
    of_one_trace, calls = calls, 0

    def one(angles: jax.Array, seed: int) -> int:
        nonlocal calls
        calls = 0
        jm.search.dataflow(
            counted,
            {"angle": angles},
            likeness,
            repeats=2,
            population=8,
            generations=3,
            args=(jnp.asarray(TARGET),),
            key=jax.random.key(seed),
        )
        return calls

    # The objective is traced once to be checked, and once for the program of all generations; the second search finds
    # the program.
    assert one(ANGLES, 0) == 2 * of_one_trace
    assert one(ANGLES + 0.1, 1) == of_one_trace


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_generation_lowers_for(platform: str) -> None:
    slots = Slots((4,), 2)
    space = flow_space(slots, "pairs")
    strategy = jm.search.strategy("catcma", 8, space)
    flow = Flow(turn, likeness, slots, "pairs", BOUNDS)

    def generation(state: Any, key: jax.Array, layers: Any, target: jax.Array) -> Any:
        params = strategy.default_params
        population, state = strategy.ask(key, state, params)
        score = jax.vmap(lambda genome: flow(space.decode(genome), key, layers, target))
        return strategy.tell(key, population, score(population), state, params)[0]

    state = strategy.init(jax.random.key(0), space.initial_genome(), strategy.default_params)
    exported = jax.export.export(jax.jit(generation), platforms=[platform])(
        state, jax.random.key(0), {"angle": ANGLES}, jnp.asarray(TARGET)
    )
    assert exported.platforms == (platform,)


CONFIG = DecoderConfig(
    vocabulary_size=17,
    width=8,
    layers=(LayerKind(),) * 2,
    heads=2,
    key_heads=1,
    head_width=4,
    mlp_width=12,
    stacked=True,
)
MODEL = Decoder(CONFIG)
LAYER = layer_function(MODEL)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (3, 7)), jnp.int32)


def likelihood(flow: Any, key: jax.Array, ends: Any, tokens: jax.Array) -> jax.Array:
    hidden, contexts = MODEL.apply(ends, tokens[:, :-1], method="begin")
    logits = MODEL.apply(ends, flow(hidden, contexts), method="logits")
    chances = jax.nn.log_softmax(logits)
    return jnp.mean(jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1))


def test_a_decoder_from_end_to_end() -> None:
    """Two experts and a model merged from them are the sources; the path is exported, and scores what was found."""
    init = jax.jit(MODEL.init)
    experts = [init(jax.random.key(seed, impl="rbg"), TOKENS) for seed in range(2)]
    average = jm.merge("linear", experts, weight=[0.5, 0.5])
    row, joined = in_a_row([MODEL] * 3, [*experts, average], ends=2)
    assert row.config == replace(CONFIG, layers=CONFIG.layers * 3)
    layers = layers_of(row.config, joined)
    found = jm.search.dataflow(
        LAYER,
        layers,
        likelihood,
        sources=[2, 2, 2],
        repeats=2,
        start=2,
        args=(joined, TOKENS),
        population=16,
        generations=8,
        chunk=1,
        key=jax.random.key(0),
    )
    assert found.flow.skip
    module, params = along(row, joined, found.path.layers, found.path.scales)
    chances = jax.nn.log_softmax(jax.jit(module.apply)(params, TOKENS[:, :-1]))
    score = np.mean(np.take_along_axis(np.asarray(chances), np.asarray(TOKENS)[:, 1:, None], -1))
    assert score == pytest.approx(-found.evolution.fitness, abs=1e-4)
    plain = jax.nn.log_softmax(jax.jit(MODEL.apply)(average, TOKENS[:, :-1]))
    before = np.mean(np.take_along_axis(np.asarray(plain), np.asarray(TOKENS)[:, 1:, None], -1))
    assert score > before + 0.05


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="3 layers, but there are 4"):
        search(sources=[1, 2])
    with pytest.raises(ValueError, match="sources 0 to 1, found 2"):
        search(sources=[2, 2], start=2)
    with pytest.raises(ValueError, match="unknown form"):
        search(scales="slot")
    with pytest.raises(ValueError, match="below one generation"):
        search(generations=0)
