"""Low-rank task vectors: sums, inner products and best approximations without the dense matrices."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.converters.lora.orthonormal import product
from jaxmerge.converters.lora.randomised_svd import Triplets, randomised_svd
from jaxmerge.methods.factorisations import svd

Kind = Literal["linear", "transposed", "embedding"]

# Below this a full decomposition takes no longer than a random subspace.
_SMALL = 512
# The first guess of a rank that is to be found.
_FIRST_RANK = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A tensor that is the product of two factors; a pytree.

    Attributes:
      left: [rows, r], the scale in it.
      right: [r, columns].
      shape: static shape of the tensor: rows, and axes whose product is columns.
      kind: static; what PEFT adapts there: a "linear" layer or convolution (left is B, right is A), a layer that is
        stored [in, out] ("transposed": left is A^T, right is B^T), or an "embedding" (likewise).
    """

    left: jax.Array
    right: jax.Array
    shape: tuple[int, ...] = field(metadata={"static": True})
    kind: Kind = field(default="linear", metadata={"static": True})

    @property
    def rank(self) -> int:
        """r, the number of columns of `left`; the matrix may have a lower one."""
        return self.left.shape[1]

    def dense(self) -> jax.Array:
        """The tensor itself, of `shape`."""
        return _dense(self)


def low_rank_sum(terms: Sequence[LowRank], weights: Sequence[float] | jax.Array) -> LowRank:
    r"""The weighted sum, exactly: the factors stand side by side.

    .. math:: \sum_i w_i B_i A_i = [w_1 B_1 \dots w_n B_n] \, [A_1; \dots; A_n]

    The average of the A times the average of the B would add a product B_i A_j for every pair.

    Args:
      terms: of one shape, of any ranks.
      weights: one number per term; may be traced.

    Returns:
      The sum, whose rank is the sum of the ranks.

    Raises:
      ValueError: no terms, or terms of several shapes.

    Example:
      >>> a = LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[1.0, 0.0]]), (2, 2))
      >>> b = LowRank(jnp.array([[0.0], [1.0]]), jnp.array([[0.0, 1.0]]), (2, 2))
      >>> low_rank_sum([a, b], [2.0, 3.0]).dense()
      Array([[2., 0.],
             [0., 3.]], dtype=float32)
    """
    shapes = {term.shape for term in terms}
    if len(shapes) != 1:
        raise ValueError(f"expected terms of one shape, found {sorted(shapes)}")
    left = jnp.concatenate([weights[i] * term.left for i, term in enumerate(terms)], axis=1)
    right = jnp.concatenate([term.right for term in terms], axis=0)
    return replace(terms[0], left=left, right=right)


@jax.jit
def inner(a: LowRank, b: LowRank) -> jax.Array:
    r"""The inner product of two low-rank tensors, from their factors.

    .. math:: \langle B A, B' A' \rangle = \mathrm{tr}\big((B^T B') (A' A^T)\big)

    Args:
      a: of any rank.
      b: of the same shape.

    Returns:
      float32 []; `inner(a, a)` is the squared Frobenius norm.

    Example:
      >>> a = LowRank(jnp.array([[1.0], [2.0]]), jnp.array([[1.0, 1.0]]), (2, 2))
      >>> inner(a, a)
      Array(10., dtype=float32)
    """
    return jnp.sum(product(a.left.T, b.left) * product(a.right, b.right.T))


def truncate(term: LowRank, *, rank: int | None = None, energy: float | None = None) -> LowRank:
    """The best approximation of a lower rank, from the factors alone.

    Args:
      term: of any rank.
      rank: the rank wanted; a larger one than there is changes nothing but the factors.
      energy: the least share of the squared norm to keep, in (0, 1]; with `rank` too, that is the most.

    Returns:
      The approximation; both factors carry the square roots of the singular values.

    Raises:
      ValueError: neither is given, or they are out of bounds.

    Example:
      >>> term = LowRank(jnp.eye(3), jnp.diag(jnp.array([4.0, 1.0, 0.1])), (3, 3))
      >>> truncate(term, rank=1).rank, truncate(term, energy=0.99).rank
      (1, 2)
    """
    check_rank(rank, energy)
    found = _of_product(term.left, term.right)
    kept = _kept(found.s, rank, energy, total=None)
    return _from_triplets(found, kept, term.shape, term.kind)


def factorise(
    tensor: jax.Array | np.ndarray,
    *,
    rank: int | None = None,
    energy: float | None = None,
    kind: Kind = "linear",
    key: jax.Array | None = None,
) -> LowRank:
    """The best approximation of a dense tensor by factors; by a randomised SVD where it is large.

    Args:
      tensor: [rows, ...], two axes or more.
      rank: the rank wanted, at most that of the matrix [rows, columns].
      energy: the least share of the squared norm to keep, in (0, 1]; with `rank` too, that is the most.
      kind: see `LowRank`.
      key: draws the subspace; None: `jax.random.key(0)`.

    Returns:
      The factors, float32. Those of zeros have rank 1.

    Raises:
      ValueError: neither rank nor energy is given, they are out of bounds, or the tensor has fewer than two axes.

    Example:
      >>> factorise(jnp.outer(jnp.arange(3.0), jnp.ones(2)), energy=0.999).rank
      1
    """
    check_rank(rank, energy)
    if len(tensor.shape) < 2:
        raise ValueError(f"expected two axes or more, found shape {list(tensor.shape)}")
    shape = tuple(tensor.shape)
    matrix = jnp.asarray(tensor, jnp.float32).reshape(shape[0], -1)
    limit = min(rank or max(matrix.shape), *matrix.shape)
    key = jax.random.key(0) if key is None else key
    total = None if energy is None else float(_squared_norm(matrix))
    wanted = limit if energy is None else min(_FIRST_RANK, limit)
    while True:
        found = _decomposed(matrix, wanted, key)
        if energy is None or len(found.s) >= limit or _share(found.s, total) >= energy:
            break
        wanted = min(2 * wanted, limit)
    return _from_triplets(found, _kept(found.s, rank, energy, total), shape, kind)


def check_rank(rank: int | None, energy: float | None) -> None:
    """Raises a ValueError unless a rank, a share of energy or both are given, within their bounds."""
    if rank is None and energy is None:
        raise ValueError("expected a rank or an energy, found neither")
    if rank is not None and rank < 1:
        raise ValueError(f"expected a rank of at least 1, found {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"expected an energy in (0, 1], found {energy:g}")


@jax.jit
def _dense(term: LowRank) -> jax.Array:
    return product(term.left, term.right).reshape(term.shape)


@jax.jit
def _squared_norm(matrix: jax.Array) -> jax.Array:
    return jnp.sum(matrix * matrix)


def _decomposed(matrix: jax.Array, rank: int, key: jax.Array) -> Triplets:
    """At least so many triplets: all of them where that takes no longer."""
    most = min(matrix.shape)
    if most <= _SMALL or 2 * rank >= most:
        return _full(matrix)
    return randomised_svd(matrix, key, rank=rank)


@jax.jit
def _full(matrix: jax.Array) -> Triplets:
    return Triplets(*svd(matrix))


@jax.jit
def _of_product(left: jax.Array, right: jax.Array) -> Triplets:
    q_left, r_left = jnp.linalg.qr(left)
    q_right, r_right = jnp.linalg.qr(right.T)
    u, s, v = svd(product(r_left, r_right.T))
    return Triplets(product(q_left, u), s, product(v, q_right.T))


def _share(s: jax.Array, total: float | None) -> float:
    energy = float(np.sum(np.square(np.asarray(s, np.float64))))
    whole = energy if total is None else total
    return 1.0 if whole == 0 else energy / whole


def _kept(s: jax.Array, rank: int | None, energy: float | None, total: float | None) -> int:
    """How many of the singular values to keep: at least 1."""
    kept = len(s) if rank is None else min(rank, len(s))
    if energy is not None:
        squares = np.square(np.asarray(s, np.float64))
        whole = squares.sum() if total is None else total
        # Sums that reach the share but for rounding reach it.
        reached = np.cumsum(squares) >= (energy - 1e-6) * whole
        kept = min(kept, int(np.argmax(reached)) + 1 if reached.any() else len(s))
    return max(kept, 1)


def _from_triplets(found: Triplets, kept: int, shape: tuple[int, ...], kind: Kind) -> LowRank:
    root = jnp.sqrt(found.s[:kept])
    return LowRank(found.u[:, :kept] * root[None], root[:, None] * found.v[:kept], shape, kind)
