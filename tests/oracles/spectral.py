"""Merges of matrices through their singular values.

Matrices only; other tensors get the mean of the task vectors (times the scale), unless said. A
singular value below RANK times the largest counts as 0 and its vectors, which are arbitrary, are
left out: of the sum that spreads a value over them, and of the concatenations before a polar
factor. So zero, identical and low-rank task vectors have one answer.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ._types import Array, Numbers, Tensors, f64, per_model
from .averages import linear
from .task_vectors import Divisor, count, deltas_of, elected, largest, masked, summed

RANK = 1e-6
"""Singular values below this fraction of the largest are 0."""


def tsv(
    base: Array,
    models: Sequence[Array],
    scale: float = 1.0,
    rank: int | None = None,
    weight: Numbers = 1.0,
) -> Array:
    """theta_0 + scale * U' S V'^T: each task's top vectors, side by side, made orthogonal.

    TSV-M, Gargiulo et al. 2025. U, S, V concatenate the top `rank` (floor(min(m, n) / T), at least
    1) singular triplets of every d_t; U' = P Q^T from U = P D Q^T is the polar factor, V' likewise.
    A weight, our addition, scales its task's singular values in S (or its d_t in the mean).
    """
    deltas, weights = deltas_of(base, models), per_model(weight, len(models))
    if f64(base).ndim != 2:
        return f64(base) + scale * summed(deltas, weights, normalize=False) / len(deltas)
    keep = rank if rank is not None else max(min(f64(base).shape) // len(deltas), 1)
    parts = [_svd(d, keep) for d in deltas]
    u, _, v = _side_by_side(parts)
    s = np.concatenate([w * part[1] for w, part in zip(weights, parts, strict=True)])
    return f64(base) + scale * (_polar(u) * s) @ _polar(v).T


def iso_c(base: Array, models: Sequence[Array], scale: float = 1.0, mixing: float = 1.0) -> Array:
    """theta_0 + scale * mean(sigma) U V^T of sum_t d_t (Marczak et al. 2025).

    The mean runs over the nonzero singular values. Below `mixing` = 1, our addition, a share of the
    original spectrum stays.
    """
    deltas = deltas_of(base, models)
    if f64(base).ndim != 2:
        return f64(base) + scale * summed(deltas, 1.0, normalize=True)
    u, s, v = _svd(summed(deltas, 1.0, normalize=False))
    return f64(base) + scale * (((1 - mixing) * s + mixing * _mean(s)) * u) @ v.T


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

    Stoica et al. 2025. Tensors that are not matrices take TIES entry by entry. An entry of S V_t^T
    below RANK times the largest singular value is 0: rounding has no sign to elect.
    """
    deltas = deltas_of(base, models)
    matrix = f64(base).ndim == 2 and f64(base).size > 0
    basis = None
    if matrix:
        u, s, vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
        coordinates = s[:, None] * vt
        coordinates[np.abs(coordinates) <= RANK * s.max()] = 0.0
        basis, deltas = u, np.split(coordinates, len(deltas), axis=1)
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


def opcm(
    base: Tensors,
    models: Sequence[Tensors],
    scale: float = 1.0,
    alpha: float = 0.5,
    scope: Literal["model", "tensor"] = "model",
) -> Tensors:
    """theta_0 + scale * S / lambda: each next task vector is projected off what is merged already.

    OPCM, Tang et al. 2025. S_1 = d_1; S_t = S_{t-1} + P(d_t) with S_{t-1} = U diag(sigma) V^T and
    P(d) = d without its parts along u_i v_j^T for i, j <= r and for i = j, r the fewest singular
    values that hold `alpha` of their sum. The paper divides by a lambda_t at every step so that the
    norm is the mean of the norms of d_1 .. d_t; P depends on directions alone, so lambda_T is all.

    Choices: r = 0 at alpha = 0; vectors of zero singular values remove nothing; norms are over the
    whole model ("model", the paper) or over each tensor; tensors that are not matrices are summed
    unprojected; S = 0 gives the base.
    """
    merged, length = {}, {}
    for name in base:
        deltas = deltas_of(base[name], [model[name] for model in models])
        total = deltas[0]
        for d in deltas[1:]:
            total = total + (_projected(d, total, alpha) if d.ndim == 2 else d)
        merged[name] = total
        length[name] = [float(np.sum(d**2)) for d in [total, *deltas]]
    whole = [math.fsum(parts) for parts in zip(*length.values(), strict=True)]
    result = {}
    for name in base:
        is_now, *of_tasks = np.sqrt(whole if scope == "model" else length[name])
        factor = float(np.mean(of_tasks)) / is_now if is_now > 0 else 0.0
        result[name] = f64(base[name]) + scale * factor * merged[name]
    return result


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
    if not s.size:
        return np.zeros_like(d)
    k = max(_fewest(s, eta), 1)
    return (u[:, :k] * s[:k]) @ v[:, :k].T * (math.fsum(s) / math.fsum(s[:k]))


def _fewest(s: Array, share: float) -> int:
    """How many of the largest hold `share` of the sum; none where that is 0."""
    before = np.cumsum(s) - s
    return int(np.sum(before < (share - 1e-12) * s.sum()))


def _projected(d: Array, merged: Array, alpha: float) -> Array:
    u, s, v = _svd(merged)
    inside = u.T @ d @ v
    leading = np.arange(len(s)) < _fewest(s, alpha)
    removed = np.outer(leading, leading) | np.eye(len(s), dtype=bool)
    return d - u @ np.where(removed, inside, 0.0) @ v.T
