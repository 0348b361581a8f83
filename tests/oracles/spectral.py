"""Merges of matrices through their singular values.

Matrices only; other tensors get the mean of the task vectors (times the scale), unless said. A
singular value below RANK times the largest counts as 0 and its vectors, which are arbitrary, are
left out: of the sum that spreads a value over them, and of the concatenations before a polar
factor. So zero, identical and low-rank task vectors have one answer.
"""

import math
from collections.abc import Sequence

import numpy as np

from ._types import Array, Numbers, f64, per_model
from .averages import linear
from .task_vectors import Divisor, count, deltas_of, elected, largest, masked, summed

RANK = 1e-6
"""Singular values below this fraction of the largest are 0."""


def tsv(base: Array, models: Sequence[Array], scale: float = 1.0, rank: int | None = None) -> Array:
    """theta_0 + scale * U' S V'^T: each task's top vectors, side by side, made orthogonal.

    TSV-M, Gargiulo et al. 2025. U, S, V concatenate the top `rank` (floor(min(m, n) / T), at least
    1) singular triplets of every d_t; U' = P Q^T from U = P D Q^T is the polar factor, V' likewise.
    """
    deltas = deltas_of(base, models)
    if f64(base).ndim != 2:
        return f64(base) + scale * summed(deltas, 1.0, normalize=True)
    keep = rank if rank is not None else max(min(f64(base).shape) // len(deltas), 1)
    parts = [_svd(d, keep) for d in deltas]
    u, s, v = _side_by_side(parts)
    return f64(base) + scale * (_polar(u) * s) @ _polar(v).T


def iso_c(base: Array, models: Sequence[Array], scale: float = 1.0) -> Array:
    """theta_0 + scale * mean(sigma) U V^T of sum_t d_t (Marczak et al. 2025).

    The mean runs over the nonzero singular values.
    """
    deltas = deltas_of(base, models)
    if f64(base).ndim != 2:
        return f64(base) + scale * summed(deltas, 1.0, normalize=True)
    u, s, v = _svd(summed(deltas, 1.0, normalize=False))
    return f64(base) + scale * (_mean(s) * u) @ v.T


def iso_cts(base: Array, models: Sequence[Array], scale: float = 1.0, common: float = 0.8) -> Array:
    """Flatten a common subspace joined by each task's strongest directions outside it.

    Marczak et al. 2025, r = min(m, n). s = round((r - floor(common r)) / T) directions per task,
    at most floor(r / T); U_c, V_c, sigma_c are the top r - T s of sum_t d_t; task t adds the top s
    of d_t - U_c U_c^T d_t. Polar factors of the concatenated U and V, times the mean of all these
    singular values. The rounding follows the published code.
    """
    deltas = deltas_of(base, models)
    if f64(base).ndim != 2:
        return f64(base) + scale * summed(deltas, 1.0, normalize=True)
    r, tasks = min(f64(base).shape), len(deltas)
    each = min(round((r - count(common, r)) / tasks), r // tasks)
    shared = _svd(summed(deltas, 1.0, normalize=False), r - tasks * each)
    outside = [d - shared[0] @ (shared[0].T @ d) for d in deltas]
    own = [
        _svd(d, each, float(np.linalg.norm(whole)))
        for d, whole in zip(outside, deltas, strict=True)
    ]
    u, s, v = _side_by_side([shared, *own])
    return f64(base) + scale * (_mean(s) * _polar(u)) @ _polar(v).T


def knots(
    base: Array,
    models: Sequence[Array],
    weight: Numbers = 1.0,
    density: Numbers = 1.0,
    scale: float = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    divisor: Divisor = "absolute",
) -> Array:
    """TIES in a shared basis: [d_1 .. d_T] = U S [V_1 .. V_T]^T, merge the S V_t^T, map back by U.

    Stoica et al. 2025. Tensors that are not matrices take TIES entry by entry.
    """
    deltas = deltas_of(base, models)
    matrix = f64(base).ndim == 2 and f64(base).size > 0
    basis = None
    if matrix:
        u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
        basis, deltas = u, np.split(s[:, None] * vt, len(deltas), axis=1)
    kept = [
        masked(d, largest(np.abs(d), count(p, d.size)), "l1" if rescale else None, p)
        for d, p in zip(deltas, per_model(density, len(deltas)), strict=True)
    ]
    merged = elected(kept, weight, normalize, divisor)
    return f64(base) + scale * (merged if basis is None else basis @ merged)


def star(
    base: Array,
    models: Sequence[Array],
    eta: float = 0.4,
    weight: Numbers = 1.0,
    scale: float = 1.0,
    normalize: bool = True,
) -> Array:
    """Truncate each d_t to the fewest singular values (>= 1) that hold `eta` of their sum.

    Lee et al. 2025. The kept ones are multiplied to restore that sum (nuclear norm); then a
    weighted mean. Tensors that are not matrices are averaged as they are.
    """
    deltas = deltas_of(base, models)
    if f64(base).ndim == 2:
        deltas = [_truncated(d, eta) for d in deltas]
    return f64(base) + scale * summed(deltas, weight, normalize)


def cart(models: Sequence[Array], rank: int, scale: float = 1.0) -> Array:
    """mean + scale * sum_t SVD_rank(theta_t - mean) (Choi et al. 2024); the mean if no matrix."""
    mean = linear(models)
    if mean.ndim != 2:
        return mean
    total = np.zeros_like(mean)
    for d in deltas_of(mean, models):
        u, s, v = _svd(d, rank, float(np.linalg.norm(mean)))
        total = total + (u * s) @ v.T
    return mean + scale * total


Triplets = tuple[Array, Array, Array]


def _svd(d: Array, keep: int | None = None, size: float = 0.0) -> Triplets:
    """U [m, k], sigma [k], V [n, k] of the nonzero singular values, at most `keep`.

    Zero is relative to the largest one, or to `size` where `d` is a remainder of something bigger.
    """
    u, s, vt = np.linalg.svd(d, full_matrices=False)
    least = max(RANK * float(s.max(initial=0.0)), 1e-12 * size)
    k = min(int(np.sum(s > least)), len(s) if keep is None else keep)
    return u[:, :k], s[:k], vt[:k].T


def _side_by_side(parts: Sequence[Triplets]) -> Triplets:
    u, s, v = zip(*parts, strict=True)
    return np.concatenate(u, axis=1), np.concatenate(s), np.concatenate(v, axis=1)


def _polar(a: Array) -> Array:
    """P Q^T of a = P D Q^T, over the nonzero D."""
    p, _, q = _svd(a)
    return p @ q.T


def _mean(s: Array) -> float:
    return float(s.mean()) if s.size else 0.0


def _truncated(d: Array, eta: float) -> Array:
    u, s, v = _svd(d)
    total = float(s.sum())
    if total == 0:
        return np.zeros_like(d)
    reached = np.cumsum(s) / total >= eta - 1e-12
    k = int(np.argmax(reached)) + 1 if reached.any() else len(s)
    return (u[:, :k] * s[:k]) @ v[:, :k].T * (total / math.fsum(s[:k]))
