"""Fisher information from second moments, found in the states of real optax optimisers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmerge.statistics import fisher_from_moments

PARAMS = {"body": {"w": jnp.ones((2, 3))}, "head": jnp.ones(3)}
GRADIENTS = {
    "body": {"w": jnp.arange(6.0).reshape(2, 3) / 10},
    "head": jnp.array([1.0, -2.0, 0.5]),
}
SQUARES = jax.tree.map(lambda g: np.asarray(g) ** 2, GRADIENTS)


def state_after(
    optimiser: Any, steps: int = 3, params: Any = PARAMS, gradients: Any = GRADIENTS
) -> Any:
    """A constant gradient's second moment, corrected for its start, is its square."""
    state = optimiser.init(params)
    for _ in range(steps):
        _, state = optimiser.update(gradients, state, params)
    return state


def close(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), found, expected
    )


@pytest.mark.parametrize(
    "optimiser",
    [
        optax.adam(0.1),
        optax.adamw(0.1),
        optax.amsgrad(0.1),
        optax.chain(optax.clip(9.0), optax.chain(optax.scale_by_adam()), optax.trace(0.9)),
        optax.inject_hyperparams(optax.adam)(0.1, b2=0.9),
        optax.chain(optax.scale_by_rms(bias_correction=True), optax.scale(-0.1)),
        optax.masked(optax.adam(0.1), {"body": True, "head": True}),
        optax.MultiSteps(optax.adam(0.1), 1),
    ],
    ids=["adam", "adamw", "amsgrad", "chain", "injected", "rms", "masked", "accumulated"],
)
def test_moments_are_found_and_corrected(optimiser: Any) -> None:
    close(fisher_from_moments(state_after(optimiser)), SQUARES)


def test_the_batch_size_multiplies() -> None:
    found = fisher_from_moments(state_after(optax.adam(0.1)), batch_size=8)
    close(found, jax.tree.map(lambda x: 8 * x, SQUARES))


def test_noise_averaged_over_a_batch_gives_the_fisher_of_one_example() -> None:
    # Per-example gradients of mean 0 and variance 4: batches of 16 have a quarter, times 16.
    gradients = 2 * np.random.default_rng(0).standard_normal((4000, 16)).mean(1, keepdims=True)
    optimiser = optax.scale_by_adam(b2=0.999)

    def update(state: Any, gradient: jax.Array) -> tuple[Any, None]:
        return optimiser.update(gradient, state)[1], None

    state = jax.lax.scan(update, optimiser.init(jnp.zeros(1)), jnp.asarray(gradients, jnp.float32))[
        0
    ]
    assert float(fisher_from_moments(state, batch_size=16)[0]) == pytest.approx(4.0, rel=0.15)


def test_another_decay_is_given_or_read() -> None:
    state = state_after(optax.adam(0.1, b2=0.95))
    close(fisher_from_moments(state, b2=0.95), SQUARES)
    close(fisher_from_moments(state_after(optax.rmsprop(0.1)), steps=3), SQUARES)
    close(fisher_from_moments(state_after(optax.rmsprop(0.1, decay=0.8)), b2=0.8, steps=3), SQUARES)


def test_partitions_are_put_together_and_the_rest_is_zero() -> None:
    labels = {"body": "slow", "head": "fast"}
    both = optax.multi_transform({"slow": optax.adam(0.1), "fast": optax.rmsprop(0.1)}, labels)
    state = state_after(both)
    rms = {"body": SQUARES["body"], "head": SQUARES["head"] * (1 - 0.9**3)}
    close(fisher_from_moments(state, PARAMS), rms)
    frozen = optax.multi_transform({"slow": optax.adam(0.1), "fast": optax.sgd(0.1)}, labels)
    state = state_after(frozen)
    close(fisher_from_moments(state, PARAMS), {"body": SQUARES["body"], "head": np.zeros(3)})
    with pytest.raises(ValueError, match="pass params="):
        fisher_from_moments(state)


def test_a_tree_of_moments_is_taken_as_it_stands_or_corrected() -> None:
    moments = {"layer.weight": np.full((2, 2), 0.002), "steps": np.zeros(())}
    close(
        fisher_from_moments(moments, batch_size=2),
        {"layer.weight": np.full((2, 2), 0.004), "steps": 0.0},
    )
    corrected = fisher_from_moments(moments, steps=2, b2=0.5)
    np.testing.assert_allclose(corrected["layer.weight"], 0.002 / 0.75, rtol=1e-6)
    only = fisher_from_moments({"w": jnp.ones(2)}, {"w": jnp.ones(2), "n": jnp.arange(2)})
    close(only, {"w": np.ones(2), "n": np.zeros(2)})


def test_models_that_are_named_tuples_may_give_a_tree_of_moments() -> None:
    class Model(NamedTuple):
        w: Any

    close(fisher_from_moments(Model(jnp.ones(2)), Model(jnp.zeros(2))), Model(np.ones(2)))


def test_it_maps_over_stacked_states_inside_a_program() -> None:
    states = [state_after(optax.adam(0.1), n) for n in (1, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    found = jax.jit(jax.vmap(fisher_from_moments))(stacked)
    close(found, jax.tree.map(lambda x: np.stack([x, x]), SQUARES))
    with pytest.raises(ValueError, match="vmap over stacked states"):
        fisher_from_moments(stacked)


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (optax.sgd(0.1).init(PARAMS), {}, "found no second moments in tuple"),
        (optax.sgd(0.1, momentum=0.9).init(PARAMS), {}, "found no second moments"),
        ((), {}, "found no second moments"),
        (optax.adabelief(0.1).init(PARAMS), {}, "ScaleByBeliefState holds no second moments"),
        (optax.adam(0.1).init(PARAMS), {}, "no update yet"),
        (state_after(optax.chain(optax.scale_by_adam(), optax.scale_by_rms())), {"params": PARAMS},
         "several second moments for tensor 'body/w'"),
        (state_after(optax.adam(0.1)), {"batch_size": 0}, "batch_size is at least 1"),
        (state_after(optax.adam(0.1)), {"b2": 1.0}, "b2 lies between 0 and 1"),
        (state_after(optax.adam(0.1)), {"params": {"body": PARAMS["body"]}},
         "params lacks 'head'"),
        ({"heat": jnp.ones(3)}, {"params": {"head": jnp.ones(3)}},
         r"tensor 'head': params has shape \[3\]|params lacks 'heat'.*did you mean 'head'"),
        ({"w": jnp.ones(2)}, {"params": {"w": jnp.ones(3)}}, r"'w': params has shape \[3\], .*\[2\]"),
        ({"w": jnp.ones(2)}, {"params": {"w": jnp.ones(2), "v": jnp.ones(2)}},
         "no second moments for 'v'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(state: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher_from_moments(state, **options)
