"""Greedy soups: the procedure of the paper in NumPy, traced and on the host."""

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

import jaxmerge as jm

FUSION = jm.fusion
COUNT = 5


def greedy(models: np.ndarray, score: Callable[[np.ndarray], float]) -> tuple[np.ndarray, list]:
    """The soup and whether each model [n, ...] is in it, from the best to the worst."""
    scores = [score(model) for model in models]
    ranked = sorted(range(len(models)), key=lambda i: (-scores[i], i))
    kept, best = [], -np.inf
    for i in ranked:
        now = score(models[[*kept, i]].mean(0))
        if np.isfinite(now) and now >= best:
            kept, best = [*kept, i], now
    return models[kept].mean(0), [i in kept for i in range(len(models))]


def near_two(params: Any) -> Any:
    return -jnp.sum((params["w"] - 2.0) ** 2)


def as_models(values: Any) -> list[dict[str, Any]]:
    return [{"w": jnp.asarray(value, jnp.float32)} for value in values]


# Quarters: float32 and float64 agree on the models' own scores to the bit, and so on their order.
@hypothesis.given(
    hypothesis.extra.numpy.arrays(np.int64, (COUNT, 2), elements=st.integers(-20, 20))
)
@hypothesis.settings(max_examples=40)
def test_the_driver_follows_the_paper(quarters: np.ndarray) -> None:
    values = quarters / 4.0
    margins: list[float] = []

    def score(value: np.ndarray) -> float:
        return -float(((value - 2.0) ** 2).sum())

    wanted, kept = greedy(values, score)
    trial: list[int] = []
    for i in sorted(range(COUNT), key=lambda i: (-score(values[i]), i)):
        if trial:
            margins.append(score(values[[*trial, i]].mean(0)) - score(values[trial].mean(0)))
        if kept[i]:
            trial.append(i)
    # Where a mean ties, rounding decides.
    hypothesis.assume(all(abs(margin) > 1e-4 for margin in margins))
    soup, info = FUSION.soup_greedily(as_models(values), near_two)
    np.testing.assert_allclose(soup["w"], wanted, atol=1e-5)
    assert info.kept.tolist() == kept
    np.testing.assert_allclose(info.score, score(wanted), atol=1e-3)


def test_scores_order_and_members_are_told_in_the_order_given() -> None:
    soup, info = FUSION.soup_greedily(as_models([[9.0], [3.0], [1.0]]), near_two)
    np.testing.assert_allclose(info.scores, [-49.0, -1.0, -1.0])
    assert info.order.tolist() == [1, 2, 0]
    assert info.kept.tolist() == [False, True, True]
    assert float(info.score) == 0.0
    np.testing.assert_array_equal(soup["w"], [2.0])


def test_equal_scores_go_to_the_earlier_and_do_not_keep_a_model_out() -> None:
    models = as_models([[1.0], [5.0], [3.0]])
    soup, info = FUSION.soup_greedily(models, lambda params: jnp.zeros(()))
    assert info.order.tolist() == [0, 1, 2]
    assert info.kept.all()
    np.testing.assert_allclose(soup["w"], [3.0])


def test_a_host_function_gives_the_same_soup() -> None:
    models = as_models(np.random.default_rng(0).normal(size=(COUNT, 2)) + 1.0)
    calls: list[float] = []

    def evaluate(params: Any) -> float:
        calls.append(-float(np.sum((np.asarray(params["w"]) - 2.0) ** 2)))
        return calls[-1]

    found = FUSION.soup_greedily(models, evaluate, host=True)
    chex.assert_trees_all_close(found, FUSION.soup_greedily(models, near_two), atol=1e-6)
    assert len(calls) == 2 * COUNT - 1


def test_scoring_in_batches_changes_nothing() -> None:
    models = as_models(np.random.default_rng(1).normal(size=(COUNT, 2)) + 1.0)
    wanted = FUSION.soup_greedily(models, near_two)
    found = FUSION.soup_greedily(models, near_two, batch_size=2)
    chex.assert_trees_all_close(found, wanted, atol=1e-6)


def test_a_score_that_is_not_finite_never_enters() -> None:
    def evaluate(params: Any) -> Any:
        bad = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf])
        value = params["w"][0]
        return jnp.where(
            value > 6.0, bad[jnp.clip(value - 7.0, 0, 2).astype(int)], near_two(params)
        )

    models = as_models([[9.0], [7.0], [1.0], [8.0], [3.0]])
    for host in (False, True):
        soup, info = FUSION.soup_greedily(models, evaluate, host=host)
        assert info.order.tolist() == [2, 4, 0, 1, 3]
        assert info.kept.tolist() == [False, False, True, False, True]
        np.testing.assert_array_equal(soup["w"], [2.0])


def test_no_finite_score_is_an_error() -> None:
    for host in (False, True):
        with pytest.raises(ValueError, match=r"no model has a finite score: found \[nan, nan\]"):
            FUSION.soup_greedily(as_models([[1.0], [2.0]]), _never, host=host)


def test_inside_a_jit_no_finite_score_gives_the_first_model() -> None:
    soup, info = jax.jit(lambda models: FUSION.soup_greedily(models, _never))(
        as_models([[1.0], [2.0]])
    )
    np.testing.assert_array_equal(soup["w"], [1.0])
    assert not info.kept.any()
    assert float(info.score) == -np.inf


def _never(params: Any) -> Any:
    return jnp.nan * params["w"][0]


def test_a_model_alone_is_its_soup() -> None:
    for host in (False, True):
        soup, info = FUSION.soup_greedily(as_models([[0.1]]), near_two, host=host)
        np.testing.assert_array_equal(soup["w"], jnp.asarray([0.1]))
        assert info.kept.tolist() == [True]


def test_the_stream_runs_in_a_scan_and_over_runs() -> None:
    values = np.random.default_rng(2).normal(size=(2, COUNT, 3)).astype(np.float32)
    soup = FUSION.greedy_soup(near_two)

    def run(models: Any) -> Any:
        state = soup.init({"w": jnp.zeros(3)})
        state, _ = jax.lax.scan(lambda s, w: (soup.update(s, {"w": w}), None), state, models)
        return soup.average(state), state

    found, states = jax.vmap(run)(values)
    for i in range(2):
        state = soup.init({"w": jnp.zeros(3)})
        for value in values[i]:
            state = soup.update(state, {"w": jnp.asarray(value)})
        np.testing.assert_allclose(found["w"][i], soup.average(state)["w"], atol=1e-6)
        assert int(states.count[i]) == int(state.count) >= 1
        assert int(states.step[i]) == COUNT
        np.testing.assert_allclose(states.score[i], state.score, atol=1e-5)


def test_the_stream_keeps_init_until_a_model_enters() -> None:
    soup = FUSION.greedy_soup(_never)
    state = soup.init({"w": jnp.full(1, 4.0)})
    state = soup.update(state, {"w": jnp.ones(1)})
    np.testing.assert_array_equal(soup.average(state)["w"], [4.0])
    assert (int(state.step), int(state.count)) == (1, 0)


def test_the_stream_leaves_out_what_is_not_finite() -> None:
    scores = iter([np.nan, 1.0, np.inf, -np.inf, np.nan, 1.0])
    soup = FUSION.greedy_soup(lambda params: next(scores))
    state = soup.init({"w": jnp.zeros(1)})
    counts = []
    for _ in range(6):
        state = soup.update(state, {"w": jnp.ones(1)})
        counts.append(int(state.count))
    assert counts == [0, 1, 1, 1, 1, 2]
    assert float(state.score) == 1.0


def test_evaluate_sees_the_stored_dtypes_and_the_mean_is_taken_in_float32() -> None:
    models = [
        {"w": jnp.full(1, value, jnp.bfloat16), "n": jnp.asarray(i)}
        for i, value in enumerate((1.0, 1.0078125, 1.0))
    ]
    seen: list[Any] = []

    def evaluate(params: Any) -> float:
        seen.append(params["w"].dtype)
        return 0.0

    soup = FUSION.greedy_soup(evaluate)
    state = soup.init(models[0])
    for model in models:
        state = soup.update(state, model)
    np.testing.assert_allclose(state.values["w"], [1.0 + 2.0**-7 / 3], rtol=1e-7)
    assert set(seen) == {jnp.dtype("bfloat16")}
    found = soup.average(state)
    assert found["w"].dtype == jnp.bfloat16
    assert int(found["n"]) == 2


def test_one_evaluate_compiles_once() -> None:
    @chex.assert_max_traces(n=2)  # once under vmap, once in the stream
    def evaluate(params: Any) -> Any:
        return near_two(params)

    for seed in range(3):
        models = as_models(np.random.default_rng(seed).normal(size=(COUNT, 2)))
        FUSION.soup_greedily(models, evaluate)


def test_bad_input_is_refused_before_anything_is_scored() -> None:
    def never_called(params: Any) -> Any:
        raise AssertionError

    with pytest.raises(ValueError, match="needs at least one model"):
        FUSION.soup_greedily([], never_called)
    with pytest.raises(ValueError, match=r"models\[1\] is unlike models\[0\]: .* tensor 'w'"):
        FUSION.soup_greedily([{"w": jnp.zeros(1)}, {"v": jnp.zeros(1)}], never_called)
    with pytest.raises(ValueError, match="batch_size >= 1, found 0"):
        FUSION.soup_greedily(as_models([[1.0]]), never_called, batch_size=0)
    with pytest.raises(ValueError, match=r"one score, found shape \[2\]"):
        FUSION.soup_greedily(as_models([[1.0, 2.0]]), lambda params: params["w"])
