"""`fit`: optima in closed form, gradients against finite differences, bounds, nesting, skipped steps, one trace."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import spherical, task_vectors

import jaxmerge as jm
from jaxmerge.learning import fit

METHODS = jm.methods
LABELS = {"head/*": "head", "**": "body"}


def trees(count: int = 3, dtype: Any = np.float32) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    shapes = {"head": (2, 3), "body": (7,)}
    return [
        {name: {"w": rng.normal(size=shape).astype(dtype)} for name, shape in shapes.items()}
        for _ in range(count)
    ]


def vector(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


TARGET = trees(4)[-1]


def distance(params: Any, batch: Any, key: Any) -> jax.Array:
    gaps = jax.tree.map(lambda one, other: jnp.sum((one - other) ** 2), params, TARGET)
    return 0.5 * sum(jax.tree.leaves(gaps))


def drawn(params: Any, batch: Any, key: Any) -> jax.Array:
    """A loss with the batch as a factor, so that one that is not finite spoils the step."""
    return batch * distance(params, None, key)


def best_weights(base: Any, models: list[Any], target: Any) -> np.ndarray:
    deltas = np.stack([vector(model) - vector(base) for model in models], axis=1)
    return np.linalg.lstsq(deltas, vector(target) - vector(base), rcond=None)[0]


def test_the_optimum_of_a_quadratic_is_found() -> None:
    base, *models = trees()
    found = fit(
        "task_arithmetic",
        models,
        distance,
        base=base,
        hyperparams={"weight": 0.3},
        learn="weight",
        optimizer=optax.sgd(0.03),
        steps=150,
    )
    weight = found.hyperparams["weight"]
    np.testing.assert_allclose(weight, best_weights(base, models, TARGET), atol=1e-4)
    assert float(found.hyperparams["scale"]) == 1.0
    assert found.losses.shape == (150,)
    assert found.losses.dtype == jnp.float32
    assert int(found.skipped) == 0
    again = jm.merge("task_arithmetic", models, base=base, **found.hyperparams)
    chex.assert_trees_all_close(found.params, again, rtol=1e-6)


def test_values_per_block_are_learned_each_for_its_block() -> None:
    base, *models = trees()
    weight = jm.tree.per_block([0.5, 0.5], LABELS)
    found = fit(
        METHODS.task_arithmetic(),
        models,
        distance,
        base=base,
        hyperparams={"weight": weight},
        learn=["weight"],
        optimizer=optax.sgd(0.04),
        steps=300,
    ).hyperparams["weight"]
    assert isinstance(found, jm.tree.PerBlock)
    assert found.blocks == ("head", "body")
    for row, block in zip(found.values, found.blocks, strict=True):
        parts = [tree[block] for tree in models]
        np.testing.assert_allclose(row, best_weights(base[block], parts, TARGET[block]), atol=1e-3)


def test_nested_hyperparameters_are_learned_under_their_blocks() -> None:
    base, *models = trees()
    method = METHODS.by_block(
        {"head": METHODS.ties(scope="tensor"), "body": METHODS.task_arithmetic()}, LABELS
    )
    found = fit(
        method,
        models,
        distance,
        base=base,
        hyperparams={"head": {"density": 0.5}, "body": {"weight": [0.1, 0.2]}},
        learn=["body/weight", "head"],
        optimizer=optax.sgd(0.04),
        steps=200,
    ).hyperparams
    deltas = [tree["body"] for tree in models]
    expected = best_weights(base["body"], deltas, TARGET["body"])
    np.testing.assert_allclose(found["body"]["weight"], expected, atol=1e-3)
    assert float(found["body"]["scale"]) == 1.0
    assert float(found["head"]["density"]) == 0.5
    assert found["head"]["weight"].shape == (2,)
    assert float(found["head"]["scale"]) != 1.0


def oracle_slerp(values: dict[str, Any], trees: list[Any]) -> Any:
    return jax.tree.map(lambda a, b: spherical.slerp(a, b, float(values["t"])), *trees)


def oracle_ties(values: dict[str, Any], trees: list[Any]) -> Any:
    return jax.tree.map(
        lambda b, *m: task_vectors.ties(b, m, values["weight"], 0.5, float(values["scale"])),
        *trees,
    )


@pytest.mark.parametrize(
    ("method", "count", "oracle", "fixed", "start"),
    [
        (METHODS.slerp(), 2, oracle_slerp, {}, {"t": np.array(0.3)}),
        (
            METHODS.ties(scope="tensor"),
            3,
            oracle_ties,
            {"density": 0.5},
            {"weight": np.array([0.4, 0.9]), "scale": np.array(0.7)},
        ),
    ],
    ids=["slerp", "ties"],
)
def test_one_step_follows_the_gradient_that_finite_differences_give(
    method: Any, count: int, oracle: Any, fixed: dict[str, Any], start: dict[str, np.ndarray]
) -> None:
    several = trees(count)
    base, models = (None, several) if count == 2 else (several[0], several[1:])
    rate, width = 0.01, 1e-4
    found = fit(
        method,
        models,
        distance,
        base=base,
        hyperparams={**fixed, **start},
        learn=list(start),
        optimizer=optax.sgd(rate),
        steps=1,
    ).hyperparams

    def loss(values: dict[str, np.ndarray]) -> float:
        return 0.5 * float(np.sum((vector(oracle(values, several)) - vector(TARGET)) ** 2))

    for name, value in start.items():
        for place in np.ndindex(value.shape):
            sides = []
            for side in (width, -width):
                moved = {one: np.array(other) for one, other in start.items()}
                moved[name][place] += side
                sides.append(loss(moved))
            slope = (sides[0] - sides[1]) / (2 * width)
            step = (value[place] - float(found[name][place])) / rate
            np.testing.assert_allclose(step, slope, rtol=1e-3, atol=1e-4)


def test_values_stay_within_their_bounds() -> None:
    base, model = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, -2.0])}
    found = fit(
        "nearswap",
        [model],
        lambda params, batch, key: jnp.sum(jnp.abs(params["w"])),
        base=base,
        hyperparams={"t": 0.5},
        optimizer=optax.sgd(1.0),
        steps=3,
    )
    assert float(found.hyperparams["t"]) == 0.0
    np.testing.assert_array_equal(found.losses, [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(found.params["w"], base["w"])


def test_steps_that_are_not_finite_are_skipped_and_batches_go_round() -> None:
    base, *models = trees()
    batches = np.array([1.0, np.nan, 0.5, np.inf], np.float32)
    settings: dict[str, Any] = {
        "base": base,
        "learn": "weight",
        "optimizer": optax.sgd(0.03, momentum=0.5),
        "steps": 6,
    }
    found = fit("task_arithmetic", models, drawn, batches=batches, **settings)
    finite = fit(
        "task_arithmetic", models, drawn, batches=batches[[0, 2]], **{**settings, "steps": 3}
    )
    assert int(found.skipped) == 3
    assert np.isfinite(found.losses).tolist() == [True, False, True, False, True, False]
    np.testing.assert_allclose(found.losses[jnp.array([0, 2, 4])], finite.losses, rtol=1e-5)
    np.testing.assert_allclose(found.hyperparams["weight"], finite.hyperparams["weight"], rtol=1e-5)


def test_the_best_iterate_is_kept_where_asked() -> None:
    base, *models = trees()
    # Every step overshoots: the start is best.
    settings: dict[str, Any] = {"base": base, "optimizer": optax.sgd(10.0), "steps": 3}
    start = {"weight": [0.25, 0.5]}
    best = fit(
        "task_arithmetic", models, distance, hyperparams=start, keep="best", **settings
    ).hyperparams
    assert best["weight"].tolist() == start["weight"]


def test_random_methods_draw_anew_and_depend_on_the_key_alone() -> None:
    base, *models = trees()
    optimizer, key = optax.sgd(0.0), jax.random.key(3)

    def run(key: Any) -> Any:
        return fit(
            "dare_linear",
            models,
            distance,
            base=base,
            hyperparams={"density": 0.5},
            optimizer=optimizer,
            steps=4,
            key=key,
        )

    one, same = run(key), run(key)
    assert len(set(one.losses.tolist())) == 4
    chex.assert_trees_all_equal(one, same)
    again = jm.merge("dare_linear", models, base=base, key=key, **one.hyperparams)
    chex.assert_trees_all_close(one.params, again, rtol=1e-6)
    with pytest.raises(ValueError, match="needs key="):
        run(None)


def test_equal_calls_share_one_trace() -> None:
    @chex.assert_max_traces(n=1)
    def objective(params: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.sum(params["body"]["w"] ** 2)

    base, *models = trees(dtype=jnp.bfloat16)
    for weight, scale in ((1, 0.5), (np.float32(0.3), 2), ([0.1, 0.2], jnp.ones(()))):
        found = fit(
            "task_arithmetic",
            models,
            objective,
            base=base,
            hyperparams={"weight": weight, "scale": scale},
            steps=2,
        )
        assert found.params["body"]["w"].dtype == jnp.bfloat16
        assert found.hyperparams["weight"].dtype == jnp.float32


def test_line_searches_get_the_objective() -> None:
    base, model = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=4, decrease_factor=0.5)
    found = fit(
        "task_arithmetic",
        [model],
        lambda params, batch, key: jnp.sum((params["w"] - 3.0) ** 2),
        base=base,
        learn="weight",
        optimizer=optax.chain(optax.sgd(1.0), search),
        steps=1,
    )
    # The whole step, 4, overshoots from 1 to 5, half of it lands.
    assert found.hyperparams["weight"].tolist() == [3.0]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("ties", {"learn": "density"}, r"density \(fraction\) cannot be learned.*weight, scale"),
        ("ties", {"learn": ["normalize"]}, r"normalize \(flag\) cannot be learned"),
        ("ties", {"learn": ["wieght"]}, "no hyperparameter 'wieght'; did you mean 'weight'"),
        ("ties", {"hyperparams": {"densty": 0.1}}, "did you mean 'density'"),
        ("ties", {"hyperparams": {"density": 1.5}}, r"must lie in \[0, 1\]"),
        ("ties", {"hyperparams": {"weight": [1.0]}}, "needs 2 values"),
        ("ties", {"learn": []}, "names nothing"),
        ("ties", {"steps": 0}, "at least one step"),
        ("ties", {"keep": "first"}, "keep is"),
        ("ties", {"batches": (np.ones(2), np.ones(3))}, "batches: '0' has 2, '1' has 3"),
        ("ties", {"batches": np.float32(1)}, "leading axis"),
        (
            METHODS.choose([METHODS.linear(), METHODS.task_arithmetic()]),
            {"learn": "method"},
            r"method \(index\) cannot be learned",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    method: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(method, [None, None], distance, base=None, **settings)


def test_an_objective_that_is_no_scalar_is_refused() -> None:
    base, *models = trees()
    with pytest.raises(ValueError, match=r"must return a scalar, found shape \[7\]"):
        fit("task_arithmetic", models, lambda params, batch, key: params["body"]["w"], base=base)
