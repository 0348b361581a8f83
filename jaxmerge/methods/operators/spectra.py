"""Spectra of weight matrices: singular triplets without the arbitrary ones, polar factors, products in full precision.

A singular value below RANK times the largest counts as 0, and its vectors, which are arbitrary, become 0: so they add
nothing to a sum of directions or to a polar factor, and zero, equal and low-rank task vectors have one answer.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.methods.factorisations import svd
from jaxmerge.methods.leaf import Chunk

RANK = 1e-6
"""Singular values below this share of the largest are 0; the rounding of a large float32 matrix makes it more."""

product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
"""A matrix product at the highest precision."""


class Triplets(NamedTuple):
    """a = (u * s) @ v, with zeros for the values that count as zero and for their vectors.

    Attributes:
      u: [..., m, k].
      s: [..., k], from the largest.
      v: [..., k, n].
    """

    u: jax.Array
    s: jax.Array
    v: jax.Array

    def top(self, k: int) -> "Triplets":
        """The k largest."""
        return Triplets(self.u[..., :k], self.s[..., :k], self.v[..., :k, :])

    def side_by_side(self) -> "Triplets":
        """The models' triplets [models, ...] in one row: u [m, models * k], s [models * k], v [models * k, n]."""
        u = jnp.moveaxis(self.u, 0, 1)
        return Triplets(
            u.reshape(u.shape[0], -1), self.s.reshape(-1), self.v.reshape(-1, self.v.shape[-1])
        )


def is_matrix(shape: tuple[int, ...], inputs: tuple[int, ...]) -> bool:
    """Whether a tensor has a spectrum: two axes, one of them the inputs'."""
    return len(shape) == 2 and len(inputs) == 1


def has_spectrum(chunk: Chunk) -> bool:
    """Whether the chunk is a matrix."""
    return is_matrix(chunk.shape, chunk.inputs)


def matrices(chunk: Chunk, arrays: list[jax.Array]) -> jax.Array:
    """One array per model as [models, outputs, inputs]."""
    return jnp.stack([chunk.as_matrix(array) for array in arrays])


def decompose(a: jax.Array, least: jax.Array | float = 0.0) -> Triplets:
    """The singular value decomposition of [..., m, n]; what is not above `least` [..., 1] counts as zero too."""
    u, s, v = svd(a)
    real = s > jnp.maximum(zero(a) * s[..., :1], least)
    return Triplets(
        jnp.where(real[..., None, :], u, 0.0),
        jnp.where(real, s, 0.0),
        jnp.where(real[..., :, None], v, 0.0),
    )


def zero(a: jax.Array) -> float:
    """What counts as zero beside the largest singular value of [..., m, n]."""
    return max(RANK, float(jnp.finfo(a.dtype).eps) * max(a.shape[-2:]) ** 0.5)


def polar(a: jax.Array) -> jax.Array:
    """P Q^T of a = P D Q^T, over the nonzero D: the nearest matrix with orthonormal columns (or rows) in a's span."""
    parts = decompose(a)
    return product(parts.u, parts.v)


def norms(a: jax.Array) -> jax.Array:
    """Frobenius norms of [..., m, n] as [..., 1]."""
    return jnp.sqrt(jnp.sum(a * a, axis=(-2, -1)))[..., None]


def mean_of_nonzero(s: jax.Array) -> jax.Array:
    """The mean of the singular values [k] that are not 0; 0 if all are."""
    return jnp.sum(s) / jnp.maximum(jnp.sum(s > 0), 1)


def fewest(s: jax.Array, share: jax.Array | float) -> jax.Array:
    """Marks the fewest leading values [..., k] that hold `share` of the sum; none where the share is 0."""
    total = jnp.sum(s, axis=-1, keepdims=True)
    before = jnp.cumsum(s, axis=-1) - s
    # Sums that reach the share but for rounding reach it.
    return (s > 0) & (before < (share - 1e-6) * total)
