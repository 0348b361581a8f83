"""Random draws depend on the key, the tensor's name and the element's place alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

import jaxmerge as jm
from jaxmerge.methods import draws


def seeds(name: str, models: int = 3, key: int = 0) -> jax.Array:
    words = draws.key_words(jax.random.key(key))
    return draws.tensor_seeds(words, jnp.asarray(jm.tree.name_words(name), jnp.uint32), models)


def test_the_generator_is_that_of_jax() -> None:
    counter = jnp.arange(100, dtype=jnp.uint32)
    arguments = jnp.uint32(17), jnp.uint32(5), counter * 7, counter
    for own, reference in zip(
        draws.threefry(*arguments), threefry2x32_p.bind(*arguments), strict=True
    ):
        np.testing.assert_array_equal(own, reference)


def test_a_chunk_draws_what_the_whole_draws_there() -> None:
    whole = draws.uniform(seeds("w"), 3, (40,), jnp.uint32(0))
    chunk = draws.uniform(seeds("w"), 3, (2, 5), jnp.uint32(20))
    for a, b in zip(whole, chunk, strict=True):
        np.testing.assert_array_equal(a[20:30], b.ravel())


def test_names_models_and_keys_draw_differently_and_uniformly() -> None:
    several = [
        *draws.uniform(seeds("w"), 3, (10_000,), jnp.uint32(0)),
        *draws.uniform(seeds("v"), 3, (10_000,), jnp.uint32(0)),
        *draws.uniform(seeds("w", key=1), 3, (10_000,), jnp.uint32(0)),
    ]
    matrix = np.corrcoef(np.stack(several))
    assert np.max(np.abs(matrix - np.eye(9))) < 0.05
    for one in several:
        assert float(one.min()) >= 0
        assert float(one.max()) < 1
        assert abs(float(one.mean()) - 0.5) < 0.01


def test_more_models_do_not_change_the_draws_of_the_first() -> None:
    few = draws.uniform(seeds("w", 2), 2, (50,), jnp.uint32(0))
    many = draws.uniform(seeds("w", 5), 5, (50,), jnp.uint32(0))
    for a, b in zip(few, many, strict=False):
        np.testing.assert_array_equal(a, b)


def test_dare_keeps_its_share_and_its_mean() -> None:
    base, model = {"w": jnp.zeros(200_000)}, {"w": jnp.ones(200_000)}
    for density in (0.1, 0.5, 0.9):
        merged = jm.merge("dare_linear", [model], base=base, density=density, key=jax.random.key(0))
        kept = float(jnp.mean(merged["w"] != 0))
        assert abs(kept - density) < 5 * np.sqrt(density * (1 - density) / 200_000)
        np.testing.assert_allclose(merged["w"][merged["w"] != 0], 1 / density, rtol=1e-6)
