"""The rest of mergekit's operators: sampled and banded trimming, spheres, per-entry choices.

The default is the published definition; `dialect=True` gives what mergekit computes instead.
"""

from collections.abc import Sequence

import numpy as np

from ._types import Array, Flags, Numbers, f64, per_model
from .task_vectors import (
    Divisor,
    Rescale,
    count,
    deltas_of,
    elected,
    largest,
    masked,
    summed,
)


def della_linear(
    base: Array,
    models: Sequence[Array],
    weight: Numbers,
    density: Numbers,
    uniforms: Sequence[Array],
    epsilon: Numbers = 0.15,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: Rescale = "paper",
) -> Array:
    """Keep entries with a probability that grows with their magnitude rank, add them up.

    Deep et al. 2024. An entry survives where its uniform draw is below its probability (see
    `keep_probability`). `rescale` "paper" divides each entry by its own probability, "l1" restores
    the L1 norm. The epsilon is mergekit's half-width; the paper's is the whole width.
    """
    kept = _sampled(base, models, density, uniforms, epsilon, rescale)
    return f64(base) + scale * summed(kept, weight, normalize)


def della(
    base: Array,
    models: Sequence[Array],
    weight: Numbers,
    density: Numbers,
    uniforms: Sequence[Array],
    epsilon: Numbers = 0.15,
    scale: float = 1.0,
    normalize: bool = True,
    rescale: Rescale = "paper",
    divisor: Divisor = "absolute",
) -> Array:
    """`della_linear`'s sampling followed by the sign election of TIES."""
    kept = _sampled(base, models, density, uniforms, epsilon, rescale)
    return f64(base) + scale * elected(kept, weight, normalize, divisor)


def keep_probability(d: Array, density: float, epsilon: float) -> Array:
    """density - eps + 2 eps * rank / (n - 1); rank 0 is the row's smallest |d|.

    A row holds all that belongs to one index of the first axis; a vector is one row; a row of one
    entry has probability `density`. Of equal magnitudes the lower index ranks higher. Where
    density +- eps leaves [0, 1] (the paper and mergekit exclude it) eps shrinks to fit, so that
    the mean stays `density`.
    """
    rows = f64(d).reshape(d.shape[0] if d.ndim > 1 else 1, -1) if d.size else f64(d)
    n = rows.shape[-1] if rows.ndim else 1
    if n < 2 or not d.size:
        return np.full(d.shape, float(density))
    eps = min(float(epsilon), float(density), 1 - float(density))
    descending = np.argsort(-np.abs(rows), axis=1, kind="stable")
    rank = np.empty_like(descending)
    np.put_along_axis(rank, descending, np.arange(n - 1, -1, -1)[None, :], axis=1)
    return (density - eps + 2 * eps * rank / (n - 1)).reshape(d.shape)


def breadcrumbs(
    base: Array,
    models: Sequence[Array],
    weight: Numbers = 1.0,
    density: Numbers = 1.0,
    gamma: Numbers = 0.01,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: bool = False,
) -> Array:
    """Sum of task vectors without their largest and smallest entries (Davari, Belilovsky 2024)."""
    kept = _banded(base, models, density, gamma, rescale)
    return f64(base) + scale * summed(kept, weight, normalize)


def breadcrumbs_ties(
    base: Array,
    models: Sequence[Array],
    weight: Numbers = 1.0,
    density: Numbers = 1.0,
    gamma: Numbers = 0.01,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    divisor: Divisor = "absolute",
) -> Array:
    """`breadcrumbs` with the sign election of TIES."""
    kept = _banded(base, models, density, gamma, rescale)
    return f64(base) + scale * elected(kept, weight, normalize, divisor)


def band(scores: Array, density: float, gamma: float) -> Flags:
    """Marks ranks [top, top + k) of one descending order (equal scores by flat index).

    k = floor(density * n), top = min(floor(gamma * n), n - k): the density is always reached.
    """
    k = count(density, scores.size)
    top = min(count(gamma, scores.size), scores.size - k)
    return largest(scores, top + k) & ~largest(scores, top)


def nuslerp(
    models: Sequence[Array],
    weight: Numbers = 1.0,
    base: Array | None = None,
    flatten: bool = True,
    row_wise: bool = False,
    dialect: bool = False,
) -> Array:
    """Slerp of two models, or of their task vectors, at t = w_2 / (w_1 + w_2), .5 for a sum of 0.

    Without `flatten` the angle is taken per vector along the first axis if `row_wise`, else along
    the last. Linear where the angle's sine is below 1e-3 (not at .9995 as `slerp` has it: that is
    1e-4 off what mergekit gives) or a norm is 0; `dialect` takes a right angle for a zero norm.
    """
    w1, w2 = per_model(weight, 2)
    t = 0.5 if abs(w1 + w2) < 1e-8 else w2 / (w1 + w2)
    origin = np.zeros_like(f64(models[0])) if base is None else f64(base)
    a, b = (f64(theta) - origin for theta in models)
    axis = None if flatten or a.ndim == 0 else (0 if row_wise else -1)
    na, nb = (np.sqrt(np.sum(v * v, axis=axis, keepdims=True)) for v in (a, b))
    norms = na * nb
    safe = np.where(norms > 0, norms, 1.0)
    dot = np.sum(a * b, axis=axis, keepdims=True)
    cos = np.where(norms > 0, dot / safe, 0.0 if dialect else 1.0)
    linear = 1 - cos * cos < 1e-6
    angle = np.arccos(np.where(linear, 0.0, cos))
    sin = np.sin(angle)
    wa = np.where(linear, 1 - t, np.sin((1 - t) * angle) / sin)
    wb = np.where(linear, t, np.sin(t * angle) / sin)
    return origin + wa * a + wb * b


def multislerp(
    models: Sequence[Array],
    weight: Numbers = 1.0,
    base: Array | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    dialect: bool = False,
) -> Array:
    """exp_mu(sum_i w_i log_mu(u_i)) * sum_i w_i |theta_i|, u_i = theta_i / |theta_i|.

    mu is the direction of sum_i w_i u_i (Buss, Fillmore 2001, one step). `dialect` takes the
    chord u - <u, mu> mu for the logarithm, which is short of it by sin(a) / a. A zero vector has
    no direction and adds nothing. Where sum_i w_i u_i vanishes (< eps): sum_i w_i theta_i. With a
    base all of this happens to task vectors.
    """
    weights = per_model(weight, len(models))
    if normalize_weights:
        total = weights.sum()
        weights = weights / (1.0 if abs(total) < 1e-8 else total)
    origin = np.zeros_like(f64(models[0])) if base is None else f64(base)
    vectors = [f64(theta) - origin for theta in models]
    units, norms = _units(vectors)
    mean = sum((w * u for w, u in zip(weights, units, strict=True)), np.zeros_like(origin))
    length = _norm(mean)
    if length < eps:
        return origin + sum((w * v for w, v in zip(weights, vectors, strict=True)), 0 * origin)
    mu = mean / length
    tangent = np.zeros_like(origin)
    for w, u in zip(weights, units, strict=True):
        tangent = tangent + w * (u - float(np.sum(u * mu)) * mu if dialect else _log(mu, u))
    return origin + _exp(mu, tangent) * float(np.dot(weights, norms))


def karcher(models: Sequence[Array], max_iter: int = 10, tol: float = 1e-5) -> Array:
    """Mean of the models' norms times the Karcher mean of their directions, equal weights.

    mu <- exp_mu(mean_i log_mu(u_i)) from the normalised mean of the u_i, until the mean tangent is
    shorter than `tol` (Grove, Karcher 1973). A zero vector has no direction: it counts in the mean
    norm only. Where the directions cancel there is no unique mean: the models' arithmetic mean.
    """
    arrays = [f64(theta) for theta in models]
    units, norms = _units(arrays)
    present = [u for u, n in zip(units, norms, strict=True) if n > 0]
    if not present:
        return np.zeros_like(arrays[0])
    mean = sum((u for u in present), np.zeros_like(arrays[0])) / len(present)
    length = _norm(mean)
    if length < 1e-8:
        return sum(arrays, np.zeros_like(arrays[0])) / len(arrays)
    mu = mean / length
    for _ in range(max_iter):
        tangent = sum((_log(mu, u) for u in present), np.zeros_like(mu)) / len(present)
        if _norm(tangent) < tol:
            break
        mu = _exp(mu, tangent)
    return mu * float(np.mean(norms))


def model_stock(
    base: Array, models: Sequence[Array], filter_wise: bool = False, dialect: bool = False
) -> Array:
    """t mean(theta) + (1 - t) theta_0, t = N c / (1 + (N - 1) c), c the mean pairwise cosine.

    Jang et al. 2024, cosines of the d. A pair with a zero vector counts as 0; one model gives
    t = 1. `filter_wise` takes c per row (last axis). The library puts t = 0 where c <= 0, since
    the formula leaves [0, 1] there and has a pole at c = -1/(N-1); mergekit (`dialect`) leaves t
    as it is, and divides by max(|d_i| |d_j|, 1e-6), which shrinks cosines of short task vectors.
    """
    deltas = deltas_of(base, models)
    n = len(deltas)
    mean = sum((f64(theta) for theta in models), np.zeros_like(f64(base))) / n
    if n == 1:
        return mean
    axis = -1 if filter_wise and f64(base).ndim > 1 else None
    cosines = [
        _cosine(deltas[i], deltas[j], axis, 1e-6 if dialect else 0.0)
        for i in range(n)
        for j in range(i + 1, n)
    ]
    c = np.mean(cosines, axis=0)
    if not dialect:
        c = np.maximum(c, 0.0)
    t = n * c / (1 + (n - 1) * c)
    return t * mean + (1 - t) * f64(base)


def sce(
    base: Array, models: Sequence[Array], select_topk: float = 1.0, dialect: bool = False
) -> Array:
    """Select by variance, weight by energy, erase minority signs (Wan et al. 2024, FuseChat-3).

    Keep the floor(select_topk * n) entries of largest variance across the d_i; of what is left
    a_i = mean(d_i^2) over its sum and m_i = [sign d_i = sign(sum_j d_j)], the sum without a and 0
    counted as +; theta_0 + sum a d m / sum a m (no model agrees: theta_0). The a_i are relative
    however small the task vectors are. mergekit (`dialect`) counts only the entries whose variance
    is not 0, k = floor(select_topk * their number), so that models that agree give theta_0 below
    select_topk = 1; here one model has no variance to select by and stays whole.
    """
    deltas = deltas_of(base, models)
    if select_topk < 1 and (dialect or len(deltas) > 1):
        stacked = np.stack(deltas)
        varies = stacked.max(axis=0) > stacked.min(axis=0)
        n = int(varies.sum()) if dialect else varies.size
        keep = largest(np.var(stacked, axis=0), count(select_topk, n))
        deltas = [np.where(keep, d, 0.0) for d in deltas]
    energy = np.array([float(np.mean(d * d)) if d.size else 0.0 for d in deltas])
    total = energy.sum()
    weights = energy / total if total > 0 else np.full(len(deltas), 1 / len(deltas))
    sign = np.where(sum(deltas, np.zeros_like(f64(base))) >= 0, 1.0, -1.0)
    agree = [np.sign(d) == sign for d in deltas]
    numerator = sum((a * d * m for a, d, m in zip(weights, deltas, agree, strict=True)), 0 * sign)
    total = sum((a * m for a, m in zip(weights, agree, strict=True)), 0 * sign)
    return f64(base) + numerator / np.where(total > 0, total, 1.0)


def nearswap(base: Array, model: Array, t: float) -> Array:
    """theta_0 + clip(t / |d|, 0, 1) * d: the nearer the two entries, the further it moves."""
    d = f64(model) - f64(base)
    size = np.abs(d)
    share = np.where(size > 0, np.clip(t / np.where(size > 0, size, 1.0), 0.0, 1.0), 1.0)
    return f64(base) + share * d


def arcee_fusion(base: Array, model: Array) -> Array:
    """theta_0 + d * [I >= median(I) + 1.5 (Q3 - Q1)], I = |d| * KL(p || q).

    p is the softmax of theta, q that of theta_0, over the last axis, each plus 1e-8; one divergence
    per row. Quartiles are sorted(I)[floor(x (n - 1))], the median too.
    """
    v0, v1 = f64(base), f64(model)
    d = v1 - v0
    if d.size == 0:
        return v0.copy()
    p, q = _softmax(v1) + 1e-8, _softmax(v0) + 1e-8
    divergence = np.sum(p * np.log(p / q), axis=-1 if d.ndim else None, keepdims=True)
    importance = np.abs(d) * divergence.reshape((*d.shape[:-1], 1) if d.ndim else ())
    ordered = np.sort(importance.ravel())
    q1, q2, q3 = (ordered[int(np.floor(x * (ordered.size - 1)))] for x in (0.25, 0.5, 0.75))
    return v0 + np.where(importance >= q2 + 1.5 * (q3 - q1), d, 0.0)


def ram(base: Array, models: Sequence[Array], epsilon: float = 1e-5) -> Array:
    """Where one model moved (|d| > epsilon) its d, where several did the mean of theirs."""
    deltas = np.stack(deltas_of(base, models))
    active = np.abs(deltas) > epsilon
    number = active.sum(axis=0)
    return f64(base) + np.sum(deltas * active, axis=0) / np.maximum(number, 1)


def ramplus_tl(
    base: Array,
    models: Sequence[Array],
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
) -> Array:
    """`ram`, the entries that one model alone moved times 1 + r * clip(shared / unique, 0, alpha).

    Counted per model and tensor: entries that it moved with others, over those that it moved alone.
    """
    deltas = np.stack(deltas_of(base, models))
    active = np.abs(deltas) > epsilon
    number = active.sum(axis=0)
    out = np.where(number > 1, np.sum(deltas * active, axis=0) / np.maximum(number, 1), 0.0)
    for d, moved in zip(deltas, active, strict=True):
        alone = moved & (number == 1)
        shared, unique = int(np.sum(moved & (number > 1))), int(np.sum(alone))
        if unique:
            out = out + np.where(alone, d, 0.0) * (
                1 + r * float(np.clip(shared / unique, 0, alpha))
            )
    return f64(base) + out


def passthrough(model: Array, scale: float = 1.0) -> Array:
    """scale * theta."""
    return scale * f64(model)


def _sampled(
    base: Array,
    models: Sequence[Array],
    density: Numbers,
    uniforms: Sequence[Array],
    epsilon: Numbers,
    rescale: Rescale,
) -> list[Array]:
    n = len(models)
    kept = []
    for d, u, p, eps in zip(
        deltas_of(base, models), uniforms, per_model(density, n), per_model(epsilon, n), strict=True
    ):
        probability = keep_probability(d, p, eps)
        keep = f64(u) < probability
        if rescale == "paper":
            kept.append(np.where(keep, d / np.where(keep, probability, 1.0), 0.0))
        else:
            kept.append(masked(d, keep, rescale, p))
    return kept


def _banded(
    base: Array, models: Sequence[Array], density: Numbers, gamma: Numbers, rescale: bool
) -> list[Array]:
    n = len(models)
    return [
        masked(d, band(np.abs(d), p, g), "l1" if rescale else None, p)
        for d, p, g in zip(
            deltas_of(base, models), per_model(density, n), per_model(gamma, n), strict=True
        )
    ]


def _norm(v: Array) -> float:
    return float(np.sqrt(np.sum(v * v)))


def _units(vectors: Sequence[Array]) -> tuple[list[Array], list[float]]:
    norms = [_norm(v) for v in vectors]
    return [v / (n if n > 0 else 1.0) for v, n in zip(vectors, norms, strict=True)], norms


def _log(mu: Array, u: Array) -> Array:
    """The tangent at mu that points to u, as long as their angle; 0 at u = mu, -mu and 0."""
    cos = float(np.clip(np.sum(u * mu), -1.0, 1.0))
    across = u - cos * mu
    sin = _norm(across)
    return across * (np.arctan2(sin, cos) / sin) if sin > 1e-12 else np.zeros_like(mu)


def _exp(mu: Array, tangent: Array) -> Array:
    length = _norm(tangent)
    if length == 0:
        return mu
    return np.cos(length) * mu + np.sin(length) / length * tangent


def _cosine(a: Array, b: Array, axis: int | None, least: float) -> Array:
    """<a, b> / max(|a| |b|, least), 0 where that is 0 / 0."""
    norms = np.sqrt(
        np.sum(a * a, axis=axis, keepdims=True) * np.sum(b * b, axis=axis, keepdims=True)
    )
    divisor = np.maximum(norms, least)
    return np.sum(a * b, axis=axis, keepdims=True) / np.where(divisor > 0, divisor, 1.0)


def _softmax(x: Array) -> Array:
    if x.ndim == 0:
        return np.ones_like(x)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
