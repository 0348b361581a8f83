"""CatCMA beside the paper's formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import evolution

from jaxmerge.search import binary, categorical, continuous, integer, space, when
from jaxmerge.search.strategies.catcma import CatCMA, CatState
from jaxmerge.search.strategies.ranking import elite

MIXED = space(
    {
        "a": categorical(["p", "q", "r"], shape=(2,)),
        "b": binary(shape=(2,), probability=0.3),
        "c": categorical(["u", "v", "w", "z"], when=when("b", index=0)),
        "x": continuous(0, 1, shape=(2,), when=when("b")),
        "y": continuous(-1, 1),
    }
)
P = 10
ES = CatCMA(P, MIXED)
COUNTS = (3, 3, 2, 2, 4)
LEAST = [(1 - 0.73 ** (1 / 5)) / (count - 1) for count in COUNTS]
STARTS = (0, 3, 6, 7, 8)


def choices(population: np.ndarray) -> list[np.ndarray]:
    found = []
    for count, start in zip(COUNTS, STARTS, strict=True):
        one = population[:, start : start + count]
        found.append((population[:, start] > 0.5).astype(int) if count == 2 else one.argmax(1))
    return found


def rows(table: jax.Array) -> list[np.ndarray]:
    return [np.asarray(r, np.float64)[:count] for r, count in zip(table, COUNTS, strict=True)]


def test_updates_are_those_of_the_formulas() -> None:
    params = ES.default_params
    state = ES.init(jax.random.key(0), MIXED.initial_genome(), params)
    np.testing.assert_allclose(rows(state.table)[2], [0.7, 0.3], rtol=1e-6)
    for generation in range(6):
        population, state = ES.ask(jax.random.key(generation), state, params)
        fitness = jax.random.normal(jax.random.key(100 + generation), (P,))
        active = np.asarray(jax.vmap(MIXED.active)(population))
        order = np.argsort(fitness)
        ranked = np.asarray(population)[order]
        here = active[order][:, list(STARTS)]
        expected = evolution.asng_update(
            {
                "table": rows(state.table),
                "signal": rows(state.signal),
                "gain": float(state.gain),
                "caution": float(state.caution),
            },
            choices(ranked),
            elite(P),
            here,
            LEAST,
        )
        numbers = [12, 13, 14]
        gaussian = evolution.cma_update(
            state.gaussian._asdict(),
            np.asarray(population)[:, numbers],
            active[:, numbers],
            np.asarray(fitness),
            np.ones(3),
        )
        state, metrics = ES.tell(jax.random.key(0), population, fitness, state, params)
        for name in ("table", "signal"):
            for ours, theirs in zip(rows(getattr(state, name)), expected[name], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert float(state.gain) == pytest.approx(expected["gain"], rel=1e-4)
        assert float(state.caution) == pytest.approx(expected["caution"], rel=1e-4)
        assert float(metrics["rate"]) == pytest.approx(1 / expected["caution"], rel=1e-4)
        for name, value in gaussian.items():
            np.testing.assert_allclose(
                getattr(state.gaussian, name), value, rtol=1e-3, atol=1e-4, err_msg=name
            )


def test_the_order_of_the_choices_does_not_matter() -> None:
    params = ES.default_params
    # The first of the two variables `a`.
    turned = np.array([2, 0, 1, *range(3, MIXED.size)])
    state = other = ES.init(jax.random.key(0), MIXED.initial_genome(), params)
    for seed in range(4):
        population, _ = ES.ask(jax.random.key(seed), state, params)
        fitness = jax.random.normal(jax.random.key(50 + seed), (P,))
        state, _ = ES.tell(jax.random.key(0), population, fitness, state, params)
        other, _ = ES.tell(jax.random.key(0), population[:, turned], fitness, other, params)
    np.testing.assert_allclose(other.table[0, :3], state.table[0, turned[:3]], rtol=1e-4)
    np.testing.assert_allclose(other.table[1:], state.table[1:], rtol=1e-4, atol=1e-6)
    assert float(state.caution) == pytest.approx(float(other.caution), rel=1e-4)


@pytest.mark.parametrize(
    "tree",
    [
        {"on": binary(shape=(5,))},
        {"x": continuous(0, 1, shape=(3,))},
        {"n": integer(0, 9, shape=(2,)), "a": categorical([3]), "b": categorical([1, 2])},
    ],
    ids=["choices", "numbers", "integers"],
)
def test_spaces_of_one_kind_are_searched_as_well(tree: dict[str, object]) -> None:
    one = space(tree)
    es = CatCMA(12, one)
    params = es.default_params

    def generation(state: CatState, key: jax.Array) -> tuple[CatState, jax.Array]:
        population, state = es.ask(key, state, params)
        points = jax.vmap(one.decode)(population)
        fitness = sum(
            jnp.sum((v - 1.0) ** 2, axis=tuple(range(1, v.ndim))) for v in points.values()
        )
        state, _ = es.tell(key, population, fitness, state, params)
        return state, jnp.min(fitness)

    @jax.jit
    def run(key: jax.Array) -> jax.Array:
        state = es.init(key, one.initial_genome(), params)
        return jax.lax.scan(generation, state, jax.random.split(key, 80))[1]

    best = run(jax.random.key(1))
    assert np.isfinite(best).all()
    single = 4.0 if "a" in tree else 0.0
    assert float(best.min()) < single + 1e-4


def test_small_populations_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4, found 2"):
        CatCMA(2, MIXED)
