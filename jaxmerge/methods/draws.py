"""Random bits that depend on the key, the tensor's name and the element's place, and on nothing else."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.methods.selection.keys import flat_index


def key_words(key: jax.Array) -> jax.Array:
    """Turns a JAX key of any implementation into the two uint32 words that seed all draws."""
    return jax.random.bits(key, (2,), jnp.uint32)


def tensor_seeds(words: jax.Array, name: jax.Array, models: int) -> jax.Array:
    """Folds the 64-bit hash of a tensor's name into the seed, then the number of each pair of models.

    Args:
      words: uint32 [2], from `key_words`.
      name: uint32 [2], from `jaxmerge.tree.name_words`.
      models: how many models draw.

    Returns:
      uint32 [pairs, 2]: a seed for each two models.
    """
    pairs = jnp.arange(math.ceil(models / 2), dtype=jnp.uint32)
    first, second = threefry(words[0], words[1], name[0], name[1])
    return jnp.stack(threefry(first, second, jnp.zeros_like(pairs), pairs), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def seeds(models: int, words: jax.Array, names: jax.Array) -> jax.Array:
    """`tensor_seeds` of many tensors: [tensors, pairs, 2] from names [tensors, 2]."""
    return jax.vmap(lambda name: tensor_seeds(words, name, models))(names)


def uniform(
    seeds: jax.Array, models: int, shape: tuple[int, ...], offset: jax.Array
) -> list[jax.Array]:
    """Draws one number in [0, 1) per model and element.

    Element i of a tensor, in row-major order of the checkpoint, takes Threefry-2x32 at counter i; the first word serves
    one model of a pair, the second the other. So a chunk that begins at `offset` draws what the whole tensor would draw
    there.

    Args:
      seeds: uint32 [pairs, 2], from `tensor_seeds`.
      models: how many models.
      shape: the chunk's shape.
      offset: uint32 [], flat index of the chunk's first element.

    Returns:
      `models` float32 arrays of `shape`, multiples of 2**-24.
    """
    # Without the barrier XLA's simplifier reorders the rounds' additions of the seeds in circles.
    seeds = jax.lax.optimization_barrier(seeds)
    index = flat_index(shape).astype(jnp.uint32) + offset
    words: list[jax.Array] = []
    for pair in range(math.ceil(models / 2)):
        words += threefry(seeds[pair, 0], seeds[pair, 1], jnp.zeros_like(index), index)
    return [
        (word >> np.uint32(8)).astype(jnp.float32) * np.float32(2**-24) for word in words[:models]
    ]


def threefry(
    first: jax.Array, second: jax.Array, high: jax.Array, low: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds: JAX's generator, unrolled so that it fuses with what uses it.

    Args:
      first, second: the key's words, uint32.
      high, low: the counter's words, uint32 arrays of one shape.

    Returns:
      Two words per counter, the bits of ``jax.extend.random.threefry2x32_p``.

    Reference:
      Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """
    keys = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    high, low = high + keys[0], low + keys[1]
    for block in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            high = high + low
            low = (low << np.uint32(rotation)) | (low >> np.uint32(32 - rotation))
            low = high ^ low
        high = high + keys[(block + 1) % 3]
        low = low + keys[(block + 2) % 3] + np.uint32(block + 1)
    return high, low
