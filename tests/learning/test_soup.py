"""Learned soups: shares against the derivative on paper, levels, temperature, refusals."""

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmerge as jm
from jaxmerge.learning import learned_soup

BATCHES, EXAMPLES, FEATURES, CLASSES = 2, 8, 3, 3


def apply_fn(params: Any, x: Any) -> Any:
    return x @ params["layers_0"] @ params["layers_1"]


def problem() -> tuple[list[Any], np.ndarray, np.ndarray]:
    """The second model made the labels; the first and the third are noise."""
    rng = np.random.default_rng(0)
    shapes = {"layers_0": (FEATURES, FEATURES), "layers_1": (FEATURES, CLASSES)}
    models = [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    inputs = rng.normal(size=(BATCHES, EXAMPLES, FEATURES)).astype(np.float32)
    return models, inputs, np.argmax(apply_fn(models[1], inputs), axis=-1)


def test_the_model_that_made_the_labels_gets_the_largest_share() -> None:
    models, inputs, labels = problem()
    found = learned_soup(apply_fn, models, inputs, labels, steps=60)
    weight = found.hyperparams["weight"]
    np.testing.assert_allclose(jnp.sum(weight), 1.0, rtol=1e-6)
    assert int(jnp.argmax(weight)) == 1
    assert float(found.losses[-1]) < 0.5 * float(found.losses[0])
    # Labels that the soup gets right call for sharper predictions.
    assert float(found.temperature) < 1.0
    again = jm.merge("linear", models, **found.hyperparams)
    chex.assert_trees_all_close(found.params, again, rtol=1e-5)


def test_one_step_follows_the_derivative_of_the_cross_entropy() -> None:
    rng = np.random.default_rng(3)
    heads = [rng.normal(size=(FEATURES, CLASSES)) for _ in range(2)]
    inputs, labels = rng.normal(size=(1, EXAMPLES, FEATURES)), rng.integers(0, CLASSES, (1, 8))
    found = learned_soup(
        lambda params, x: x @ params["w"],
        [{"w": head} for head in heads],
        inputs,
        labels,
        steps=1,
        optimizer=optax.sgd(1.0),
    )
    logits = [inputs[0] @ head for head in heads]
    mixed = (logits[0] + logits[1]) / 2
    shares = np.exp(mixed) / np.exp(mixed).sum(axis=1, keepdims=True)
    error = (shares - np.eye(CLASSES)[labels[0]]) / EXAMPLES
    # Of two shares softmax(a): d alpha_0 / d a_0 = 1/4, and the logits move by (z_0 - z_1) times that.
    towards_first = -np.sum(error * (logits[0] - logits[1])) / 4
    odds = np.exp(2 * towards_first)
    np.testing.assert_allclose(
        found.hyperparams["weight"], [odds / (1 + odds), 1 / (1 + odds)], rtol=1e-5
    )
    # z / exp(s): dz/ds = -z at s = 0.
    np.testing.assert_allclose(found.temperature, np.exp(np.sum(error * mixed)), rtol=1e-5)


def test_layers_get_shares_of_their_own() -> None:
    models, inputs, labels = problem()
    found = learned_soup(apply_fn, models, inputs, labels, level="layer", steps=20)
    weight = found.hyperparams["weight"]
    assert weight.blocks == ("layers_0", "layers_1")
    np.testing.assert_allclose(jnp.sum(weight.values, axis=1), 1.0, rtol=1e-6)
    assert not np.allclose(weight.values[0], weight.values[1], atol=1e-3)
    assert float(found.losses[-1]) < float(found.losses[0])


def test_what_does_not_fit_is_refused() -> None:
    models, inputs, labels = problem()
    with pytest.raises(ValueError, match="labels are integers"):
        learned_soup(apply_fn, models, inputs, labels.astype(np.float32))
    with pytest.raises(ValueError, match=r"same first axes \[batches, examples\]"):
        learned_soup(apply_fn, models, inputs, labels[:, :4])
    with pytest.raises(ValueError, match="level is"):
        learned_soup(apply_fn, models, inputs, labels, level="task")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one model"):
        learned_soup(apply_fn, [], inputs, labels)
