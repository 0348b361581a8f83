"""Item-response anchors: parameters are found again, and few answers tell the score."""

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxmerge.search.anchors import Items, choose_anchors, estimate_score, fit_items

N, MODELS = 60, 120


def drawn(seed: int, models: int = MODELS) -> tuple[Items, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    items = Items(
        jnp.asarray(rng.lognormal(0, 0.5, N), jnp.float32),
        jnp.asarray(rng.normal(0, 1, N), jnp.float32),
    )
    ability = rng.normal(0, 1, models).astype(np.float32)
    scores = rng.random((models, N)) < np.asarray(items.probability(ability))
    return items, ability, scores.astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> tuple[Items, jax.Array]:
    return jax.jit(fit_items)(drawn(0)[2])


def test_the_parameters_are_found_again(fitted: tuple[Items, jax.Array]) -> None:
    items, ability, _ = drawn(0)
    found, theta = fitted
    assert np.corrcoef(theta, ability)[0, 1] > 0.93
    assert np.corrcoef(found.difficulty, items.difficulty)[0, 1] > 0.93
    logs = (np.log(found.discrimination), np.log(items.discrimination))
    assert np.corrcoef(*logs)[0, 1] > 0.6


def test_the_fit_is_the_mode_of_the_posterior() -> None:
    scores = drawn(1, models=8)[2][:, :5].astype(np.float64)
    known = np.ones_like(scores, bool)
    known[2, 3] = known[5, 0] = False

    def loss(point: np.ndarray) -> float:
        theta, b, log_a = point[:8], point[8:13], point[13:]
        logits = np.exp(log_a) * (theta[:, None] - b)
        fit = np.where(known, np.logaddexp(0, logits) - scores * logits, 0).sum()
        return fit + (theta**2).sum() / 2 + (b**2).sum() / 8 + (log_a**2).sum() / 0.5

    best = optimize.minimize(loss, np.zeros(18)).x
    items, theta = jax.jit(fit_items)(np.where(known, scores, np.nan))
    np.testing.assert_allclose(theta, best[:8], atol=0.01)
    np.testing.assert_allclose(items.difficulty, best[8:13], atol=0.01)
    np.testing.assert_allclose(items.discrimination, np.exp(best[13:]), atol=0.01)


def test_a_model_of_one_parameter_discriminates_alike() -> None:
    items, _ = jax.jit(lambda s: fit_items(s, parameters=1, steps=300))(drawn(1, 20)[2])
    np.testing.assert_array_equal(items.discrimination, 1)
    assert float(jnp.std(items.difficulty)) > 0.3


def test_few_answers_tell_the_score(fitted: tuple[Items, jax.Array]) -> None:
    new = drawn(0)[0], *drawn(7)[1:]
    rng = np.random.default_rng(7)
    truth = np.asarray(new[0].probability(new[1]))
    scores = (rng.random(truth.shape) < truth).astype(np.float32)
    anchors = choose_anchors(fitted[0], 12)
    found = jax.jit(estimate_score)(fitted[0], anchors, scores[:, anchors])
    full = scores.mean(1)
    error = np.sqrt(np.mean((found.score - full) ** 2))
    plain = []
    for seed in range(20):
        chosen = np.random.default_rng(seed).choice(N, 12, replace=False)
        plain.append(np.sqrt(np.mean((scores[:, chosen].mean(1) - full) ** 2)))
    assert error < 0.75 * np.median(plain)
    # The standard error is what it says.
    assert 0.7 < error / float(jnp.sqrt(jnp.mean(found.error**2))) < 1.4


def test_all_items_as_anchors_give_the_score_itself(fitted: tuple[Items, jax.Array]) -> None:
    scores = drawn(3, 5)[2]
    found = estimate_score(fitted[0], jnp.arange(N), scores)
    np.testing.assert_allclose(found.score, scores.mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.error, 0, atol=1e-6)


def test_anchors_are_different_items_and_follow_the_abilities() -> None:
    items = Items(jnp.full(40, 2.0), jnp.linspace(-3, 3, 40))
    anchors = np.asarray(choose_anchors(items, 10))
    assert len(set(anchors.tolist())) == 10
    strong = np.asarray(choose_anchors(items, 5, jnp.array([1.9, 2.0, 2.1])))
    assert np.all(np.asarray(items.difficulty)[strong] > 1.2)
    assert sorted(np.asarray(choose_anchors(items, 40)).tolist()) == list(range(40))


def test_extreme_answers_have_finite_abilities(fitted: tuple[Items, jax.Array]) -> None:
    anchors = choose_anchors(fitted[0], 8)
    found = estimate_score(fitted[0], anchors, jnp.stack([jnp.zeros(8), jnp.ones(8)]))
    assert np.isfinite(found.ability).all()
    assert 0 <= found.score[0] < 0.35
    assert 0.65 < found.score[1] <= 1


def test_one_trace_serves_all_scores() -> None:
    fit = jax.jit(chex.assert_max_traces(lambda s: fit_items(s, steps=3), 1))
    for seed in range(3):
        fit(drawn(seed, 6)[2])


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform: str) -> None:
    def program(scores: jax.Array, answers: jax.Array) -> jax.Array:
        items, _ = fit_items(scores, steps=3)
        return estimate_score(items, choose_anchors(items, 4), answers).score

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((6, 9), (2, 4))]
    exported = jax.export.export(jax.jit(program), platforms=[platform])(*shapes)
    assert exported.platforms == (platform,)


def test_bad_scores_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[models, items\], found \[3\]"):
        fit_items(np.zeros(3))
    with pytest.raises(ValueError, match=r"\[0, 1\], found 2.0 at \[1, 0\]"):
        fit_items(np.array([[0, 1], [2, 0]], np.float32))
    with pytest.raises(ValueError, match="there are 3 items, 4 anchors cannot be chosen"):
        choose_anchors(Items(jnp.ones(3), jnp.zeros(3)), 4)
