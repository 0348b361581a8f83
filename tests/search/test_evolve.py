"""Searches: one program, noise, restarts, guards, hosts, meshes, and what is refused."""

import itertools
import math
import threading
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jaxmerge as jm
from jaxmerge.search import binary, categorical, continuous, evolve, space, when
from jaxmerge.search.evaluating import evaluate
from jaxmerge.search.generation import guard, run_generations, start
from jaxmerge.search.job import Search
from jaxmerge.search.strategies import strategy

SPHERE = space({"x": continuous(-1.0, 3.0, shape=(3,))})
MIXED = space(
    {
        "on": binary(shape=(3,)),
        "scale": continuous(-1.0, 1.0, shape=(3,), when=when("on")),
        "kind": categorical(["a", "b"]),
    }
)
KEY = jax.random.key(0)


def sphere(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    return jnp.sum((point["x"] - 1.5) ** 2)


def noisy(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    return sphere(point, key) + jax.random.normal(key)


def test_a_search_is_one_trace_whatever_it_does() -> None:
    count = itertools.count()

    def mixed(point: dict[str, jax.Array], key: jax.Array, target: jax.Array) -> jax.Array:
        next(count)
        return jnp.sum((point["scale"] * point["on"] - target) ** 2) + (point["kind"] == 0)

    def run(seed: int, target: float) -> jm.search.Result:
        return evolve(
            mixed,
            MIXED,
            strategy="sep_cma_es",
            population=8,
            generations=12,
            restarts=2,
            chunk=3,
            key=jax.random.key(seed),
            args=(jnp.full(3, target),),
            every=5,
            progress=lambda *_: None,
        )

    first = run(0, 0.5)
    # One for the search, one to see whether it is the same function twice.
    assert next(count) == 2
    before = run_generations._cache_size()
    second = run(1, -0.5)
    assert run_generations._cache_size() == before
    assert first.generations == second.generations == 12
    assert first.evaluations == 12 * 16
    assert first.fitness < 0.3
    assert second.fitness < 0.3
    assert first.best["on"].dtype == bool


def test_the_same_key_gives_the_same_search_whatever_the_chunk() -> None:
    runs = [
        evolve(sphere, SPHERE, strategy="snes", population=8, generations=5, key=KEY, chunk=chunk)
        for chunk in (None, 3)
    ]
    for other in runs[1:]:
        chex.assert_trees_all_close(other.history, runs[0].history, rtol=1e-6)
        np.testing.assert_allclose(other.genome, runs[0].genome, rtol=1e-6)
    assert runs[1].chunk == 3


def test_all_candidates_of_a_generation_see_one_key() -> None:
    plain = evolve(sphere, SPHERE, strategy="snes", population=8, generations=6, key=KEY)
    with_noise = evolve(noisy, SPHERE, strategy="snes", population=8, generations=6, key=KEY)
    # The same noise for all changes no ranking, so the search goes the same way.
    np.testing.assert_array_equal(plain.history["spread"], with_noise.history["spread"])
    offset = with_noise.history["generation_best"] - plain.history["generation_best"]
    assert np.std(offset) > 0.3


def test_elites_of_noisy_objectives_are_averaged() -> None:
    def loud(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        luck = jax.random.normal(jax.random.fold_in(key, (point["x"][0] * 1e6).astype(jnp.int32)))
        return sphere(point, key) + luck

    options: dict[str, Any] = {
        "strategy": "random",
        "population": 32,
        "generations": 40,
        "key": jax.random.key(4),
    }
    once = evolve(loud, SPHERE, **options)
    again = evolve(loud, SPHERE, **options, reevaluate=8)
    assert again.evaluations == 40 * 40
    true = [float(sphere({"x": jnp.asarray(r.best["x"])}, KEY)) for r in (once, again)]
    # What was lucky once promises more than it holds.
    assert once.fitness < true[0] - 1.0
    assert abs(again.fitness - true[1]) < 0.5


def test_what_is_not_finite_never_wins() -> None:
    def broken(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        value = sphere(point, key)
        value = jnp.where(point["x"][0] > 2.0, -jnp.inf, value)
        return jnp.where(point["x"][1] > 2.0, jnp.nan, value)

    result = evolve(broken, SPHERE, strategy="random", population=16, generations=8, key=KEY)
    assert math.isfinite(result.fitness)
    assert result.fitness >= 0
    assert 0 < result.history["nonfinite"].sum() < 8 * 16
    assert np.isfinite(result.history["mean"]).all()


def test_the_guard_puts_them_behind_the_worst() -> None:
    fitness = jnp.array([[1.0, jnp.nan, 3e38, -jnp.inf], [jnp.nan, jnp.inf, jnp.nan, jnp.nan]])
    kept = np.asarray(guard(fitness))
    assert np.isfinite(kept).all()
    assert kept[0, 0] == 1
    small = np.asarray(guard(jnp.array([[-5.0, 2.0, jnp.nan]])))
    np.testing.assert_array_equal(small, [[-5.0, 2.0, 4.0]])


def test_a_search_without_progress_ends_early() -> None:
    def flat(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        return 0.0 * jnp.sum(point["x"])

    result = evolve(
        flat, SPHERE, strategy="snes", population=8, generations=50, key=KEY, patience=4
    )
    assert result.stopped
    assert result.generations == 5
    assert result.evaluations == 5 * 8
    assert len(result.history["best"]) == 5


def test_restarts_are_searches_of_their_own() -> None:
    def two_wells(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        x = point["x"]
        return jnp.minimum(jnp.sum((x + 0.9) ** 2) + 0.5, jnp.sum((x - 2.8) ** 2))

    options: dict[str, Any] = {
        "strategy": "snes",
        "population": 16,
        "generations": 40,
        "initial": {"x": [-0.8, -0.8, -0.8]},
    }
    alone = evolve(two_wells, SPHERE, key=KEY, **options)
    several = evolve(two_wells, SPHERE, key=KEY, restarts=6, **options)
    assert alone.fitness > 0.4
    assert several.fitness < 0.3
    assert several.evaluations == 6 * alone.evaluations


def test_progress_sees_the_history() -> None:
    seen: list[tuple[int, int, int]] = []
    evolve(
        sphere,
        SPHERE,
        population=4,
        generations=7,
        key=KEY,
        every=3,
        strategy="random",
        progress=lambda done, total, history: seen.append((done, total, len(history["best"]))),
    )
    assert seen == [(3, 7, 3), (6, 7, 6), (7, 7, 7)]


def test_eight_devices_find_what_one_finds() -> None:
    mesh = jax.make_mesh((4, 2), ("population", "models"), axis_types=(AxisType.Auto,) * 2)
    target = jnp.arange(6.0).reshape(3, 2)

    def objective(point: dict[str, jax.Array], key: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.sum((point["x"][:, None] - target) ** 2)

    options: dict[str, Any] = {
        "strategy": "snes",
        "population": 10,
        "generations": 6,
        "key": KEY,
        "restarts": 2,
    }
    one = evolve(objective, SPHERE, args=(target,), **options)
    placed = jax.device_put(target, jax.NamedSharding(mesh, jax.P(None, "models")))
    for chunk in (None, 2):
        eight = evolve(objective, SPHERE, args=(placed,), mesh=mesh, chunk=chunk, **options)
        chex.assert_trees_all_close(eight.history, one.history, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(eight.genome, one.genome, rtol=1e-5, atol=1e-6)


def test_the_population_is_spread_over_the_mesh() -> None:
    mesh = jax.make_mesh((8,), ("population",), axis_types=(AxisType.Auto,))
    weights = jnp.ones((64, 64))

    def product(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        return jnp.sum(weights @ (weights * point["x"][0]))

    def flops(mesh: Any) -> float:
        search = Search(SPHERE, strategy("random", 16, SPHERE), 1, 1, 0, None, 0.0, 2, mesh)
        program = jax.jit(lambda genomes: evaluate(search, product, genomes, KEY, ()))
        cost = program.lower(jnp.zeros((16, 3))).compile().cost_analysis()
        return float(cost["flops"])

    assert flops(mesh) > 2 * 64**3
    assert flops(mesh) < 2.2 * 2 * 64**3


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["cma_es", "random"])
def test_a_search_lowers_for_accelerators(platform: str, name: str) -> None:
    search = Search(MIXED, strategy(name, 8, MIXED), 2, 1, 2, 5, 0.0, 3, None)

    def objective(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        return jnp.sum(point["scale"]) + point["kind"]

    def whole(key: jax.Array) -> Any:
        carry = start(search, key, MIXED.initial_genome())
        zero = jnp.int32(0)
        return run_generations(search, objective, 3, carry, zero, zero + 3, key, ())

    exported = jax.export.export(jax.jit(whole), platforms=[platform])(KEY)
    assert exported.platforms == (platform,)


def test_host_objectives_get_numpy_and_the_same_search() -> None:
    seen: list[Any] = []

    def host(point: dict[str, np.ndarray], key: jax.Array) -> float:
        seen.append(point)
        return float(np.sum((point["x"] - 1.5) ** 2))

    options: dict[str, Any] = {"strategy": "snes", "population": 6, "generations": 5, "key": KEY}
    compiled = evolve(sphere, SPHERE, **options)
    found = evolve(host, SPHERE, host=True, **options)
    assert len(seen) == 30
    assert isinstance(seen[0]["x"], np.ndarray)
    np.testing.assert_allclose(found.history["best"], compiled.history["best"], rtol=1e-4)


def test_workers_share_the_devices() -> None:
    together = threading.Barrier(2, timeout=20)
    devices: set[Any] = set()

    def host(point: dict[str, np.ndarray], key: jax.Array) -> float:
        together.wait()
        devices.update(jnp.zeros(1).devices())
        return float(point["x"].sum())

    evolve(
        host, SPHERE, strategy="random", population=4, generations=1, key=KEY, host=True, workers=2
    )
    assert len(devices) == 2


def test_a_failing_host_objective_says_where() -> None:
    def host(point: dict[str, np.ndarray], key: jax.Array) -> float:
        raise RuntimeError("no simulator")

    with pytest.raises(RuntimeError, match="no simulator") as caught:
        evolve(host, SPHERE, strategy="random", population=4, generations=1, key=KEY, host=True)
    assert "at the hyperparameters {'x': array" in caught.value.__notes__[0]


def test_merges_are_searched_as_they_are_merged() -> None:
    rng = np.random.default_rng(0)
    base, a, b = ({"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)} for _ in range(3))
    method = jm.methods.choose([jm.methods.task_arithmetic(), jm.methods.dare_ties()])
    state = method.init([a, b], base)
    target = jm.merge("task_arithmetic", [a, b], base=base, weight=[0.3, 0.8])

    def distance(hyperparams: Any, key: jax.Array, state: Any) -> jax.Array:
        merged = method.apply(state, hyperparams, jax.random.key(7))
        return jnp.mean((merged["w"] - target["w"]) ** 2)

    made = jm.search.space_of(
        method, models=2, only=["method", "task_arithmetic/weight", "dare_ties/density"]
    )
    result = evolve(
        distance, made, strategy="snes", population=16, generations=25, key=KEY, args=(state,)
    )
    assert result.fitness < 0.02
    again = method.apply(state, result.best, jax.random.key(7))
    np.testing.assert_allclose(np.mean((again["w"] - target["w"]) ** 2), result.fitness, rtol=1e-4)


@pytest.mark.parametrize("name", ["margin", "catcma", "umda"])
def test_mixed_strategies_are_found_by_name(name: str) -> None:
    def mixed(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        return jnp.sum((point["scale"] * point["on"] - 0.5) ** 2) + (point["kind"] == 0)

    made = strategy(name, 12, MIXED)
    result = evolve(mixed, MIXED, strategy=made, generations=40, key=KEY)
    assert result.fitness < 0.2
    assert result.best["on"].all()
    assert result.best["kind"] == 1


def test_several_objectives_give_a_front() -> None:
    def both(point: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        x = point["x"]
        losses = jnp.stack([jnp.sum(x**2), jnp.sum((x - 1.0) ** 2)])
        return jnp.where(x[0] > 2.5, jnp.nan, losses)

    options: dict[str, Any] = {"objectives": 2, "population": 16, "generations": 25, "key": KEY}
    result = evolve(both, SPHERE, strategy="nsga2", restarts=2, **options)
    points = result.fitness
    assert points.shape == (len(result.genome), 2)
    assert 8 <= len(points) <= 16
    assert result.best["x"].shape == (len(points), 3)
    worse = (points[:, None] >= points[None]).all(2) & (points[:, None] > points[None]).any(2)
    assert not worse.any()
    assert (np.diff(points[:, 0]) >= 0).all()
    # On the front sqrt(f) + sqrt(g) is the distance between the two ideals.
    assert np.median(np.sqrt(points).sum(1)) < 1.15 * np.sqrt(3)
    np.testing.assert_allclose(points[:, 0], np.sum(result.best["x"] ** 2, axis=1), rtol=1e-4)
    np.testing.assert_allclose(result.history["best_1"][-1], points[:, 1].min())
    assert result.history["nonfinite"].sum() > 0


def ticking() -> Any:
    count = itertools.count()
    return lambda point, key: jnp.sum(point["x"]) * next(count)


GOOD: dict[str, Any] = {"strategy": "random", "population": 8, "generations": 2, "key": KEY}


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (lambda p, k: p["x"], {}, r"must return a number, found float32\[3\].*objectives=3"),
        (lambda p, k: None, {}, "must return a number, found a NoneType"),
        (lambda p, k: jnp.sum(p["x"]) * 1j, {}, r"a number, found complex64\[\]"),
        (lambda p, k: float(p["x"][0]), {}, "cannot be traced"),
        (lambda p, k: np.sum(np.sin(p["x"])), {}, "host=True"),
        (ticking(), {}, "depends on Python state"),
        (lambda p, k: jnp.sum(p["x"]) * np.random.default_rng().random(), {}, "Python state"),
        (sphere, {"generations": 0}, "budget is below one generation"),
        (sphere, {"population": 7, "strategy": "pgpe"}, "must be even"),
        (sphere, {"chunk": 0}, "chunk must be at least 1"),
        (sphere, {"restarts": 0}, "restarts must be at least 1"),
        (sphere, {"tolerance": math.nan}, "tolerance"),
        (sphere, {"reevaluate": 9}, "more than the population"),
        (sphere, {"strategy": "cma"}, "no strategy 'cma'"),
        (
            lambda p, k: p["x"],
            {"objectives": 2, "strategy": "nsga2"},
            r"array \[2\], found float32",
        ),
        (sphere, {"strategy": "nsga2"}, "nsga2 needs several objectives"),
        (sphere, {"objectives": 2}, "random takes one objective, not 2"),
        (sphere, {"initial": {"x": [0, 0, 9]}}, "x: 9 does not lie"),
        (sphere, {"strategy": strategy("random", 4, MIXED)}, "another space"),
        (lambda p, k: jnp.sum(p["x"]) * jnp.nan, {}, "not finite for any of 16 candidates"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    objective: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evolve(objective, SPHERE, **{**GOOD, **options})


def test_nothing_is_compiled_before_the_checks() -> None:
    before = run_generations._cache_size()
    with pytest.raises(ValueError, match="Python state"):
        evolve(ticking(), SPHERE, **GOOD)
    assert run_generations._cache_size() == before


def test_a_mesh_without_an_axis_for_the_population_is_refused() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"needs an axis 'population', its axes are \['data'\]"):
        evolve(sphere, SPHERE, mesh=mesh, **GOOD)


def test_a_key_is_a_key() -> None:
    with pytest.raises(TypeError, match=r"one key of jax\.random\.key"):
        evolve(sphere, SPHERE, population=8, generations=2, key=3)  # type: ignore[arg-type]
