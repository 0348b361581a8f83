"""Losses on a line and over a plane, against functions whose values are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import fusion

RNG = np.random.default_rng(0)
A, B, C = (
    {"w": jnp.asarray(RNG.standard_normal(3), jnp.float32), "n": jnp.int32(i)} for i in range(3)
)


def loss(model: dict) -> jax.Array:
    return jnp.sum(model["w"] ** 2) + model["n"]


def expected(*weights: float) -> float:
    w = sum(k * np.asarray(m["w"], np.float64) for k, m in zip(weights, (A, B, C), strict=False))
    return float(np.sum(w**2))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_line_and_the_plane_are_scored_where_they_say(batch_size: int | None) -> None:
    t, losses = fusion.path_losses(loss, A, B, points=5, batch_size=batch_size)
    np.testing.assert_allclose(losses, [expected(1 - s, s) for s in np.asarray(t)], rtol=1e-5)
    u, v = [0.0, 0.5, 1.0], [-1.0, 1.0]
    plane = fusion.plane_losses(loss, A, B, C, u, v, batch_size=batch_size)
    assert plane.shape == (2, 3)
    rows = [[expected(1 - i - j, i, j) for i in u] for j in v]
    np.testing.assert_allclose(plane, rows, rtol=1e-4, atol=1e-5)


def test_a_convex_loss_has_no_barrier_and_a_hill_has_its_height() -> None:
    assert fusion.barrier(loss, A, B) == 0

    def hill(w: jax.Array) -> jax.Array:
        return jnp.stack([jnp.exp(-jnp.sum(w**2)) + w[0], w[0]])

    ends = jnp.array([-2.0]), jnp.array([2.0])
    np.testing.assert_allclose(jm.align.barrier(hill, *ends), [1 - np.exp(-4), 0], atol=1e-6)


def test_models_can_be_prepared_before_they_are_scored() -> None:
    def prepare(model: dict) -> dict:
        return {**model, "w": model["w"] - jnp.mean(model["w"])}

    _, losses = fusion.path_losses(loss, A, B, points=2, prepare=prepare)
    centred = [np.asarray(m["w"]) - np.mean(m["w"]) for m in (A, B)]
    np.testing.assert_allclose(losses, [np.sum(w**2) for w in centred], rtol=1e-5)


def test_a_path_needs_its_ends() -> None:
    with pytest.raises(ValueError, match="expected points >= 2, found 1"):
        fusion.path_losses(loss, A, B, points=1)
