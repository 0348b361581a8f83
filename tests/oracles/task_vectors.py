"""Sums of task vectors d_i = theta_i - theta_0: trimmed, masked, rescaled, elected.

All share theta_0 + scale * sum_i w_i d_i m_i / D. A count is floor(density * n) in Python floats;
of entries that tie at a threshold the one with the lower flat index survives.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from ._types import Array, Flags, Numbers, Tensors, f64, per_model
from .averages import divisor_of_weights

Divisor = Literal["absolute", "signed"]
Rescale = Literal["paper", "l1"] | None


def task_arithmetic(
    base: Array,
    models: Sequence[Array],
    weight: Numbers = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
) -> Array:
    """theta_0 + scale * sum_i w_i d_i, over sum_i w_i if `normalize` (Ilharco et al. 2023)."""
    return f64(base) + scale * summed(deltas_of(base, models), weight, normalize)


def ties(
    base: Array,
    models: Sequence[Array],
    weight: Numbers = 1.0,
    density: Numbers = 1.0,
    scale: float = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    divisor: Divisor = "absolute",
    keep_one: bool = False,
) -> Array:
    """Trim each task vector to its largest entries, elect a sign, average what agrees with it.

    Yadav et al. 2023, one tensor at a time. `rescale` restores each task vector's L1 norm.
    `keep_one` (mergekit) keeps at least one entry at any density above 0.
    """
    kept = []
    for d, p in zip(deltas_of(base, models), per_model(density, len(models)), strict=True):
        k = max(count(p, d.size), 1 if keep_one and p > 0 else 0)
        kept.append(masked(d, largest(np.abs(d), k), "l1" if rescale else None, p))
    return f64(base) + scale * elected(kept, weight, normalize, divisor)


def ties_model_scope(
    base: Tensors,
    models: Sequence[Tensors],
    weight: Numbers = 1.0,
    density: Numbers = 1.0,
    scale: float = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    divisor: Divisor = "absolute",
) -> Tensors:
    """TIES as published: floor(density * total) entries of the whole vector of each model survive.

    Ties at the threshold go to the earlier tensor of the dict, then to the lower flat index; the
    L1 norm that `rescale` restores is that of the whole vector.
    """
    return on_whole_vector(
        lambda b, m: ties(b, m, weight, density, scale, normalize, rescale, divisor), base, models
    )


def dare(
    base: Array,
    models: Sequence[Array],
    weight: Numbers,
    density: Numbers,
    masks: Sequence[Flags],
    scale: float = 1.0,
    normalize: bool = False,
    rescale: Rescale = "paper",
) -> Array:
    """Drop entries at random, rescale the rest, add up (Yu et al. 2024), the masks given.

    `rescale` "paper" multiplies by 1/density, "l1" restores each task vector's L1 norm.
    """
    kept = _dropped(base, models, density, masks, rescale)
    return f64(base) + scale * summed(kept, weight, normalize)


def dare_ties(
    base: Array,
    models: Sequence[Array],
    weight: Numbers,
    density: Numbers,
    masks: Sequence[Flags],
    scale: float = 1.0,
    normalize: bool = False,
    rescale: Rescale = "paper",
    divisor: Divisor = "absolute",
) -> Array:
    """DARE's random drop followed by the sign election of TIES, the masks given."""
    kept = _dropped(base, models, density, masks, rescale)
    return f64(base) + scale * elected(kept, weight, normalize, divisor)


def deltas_of(base: Array, models: Sequence[Array]) -> list[Array]:
    """d_i = theta_i - theta_0."""
    return [f64(theta) - f64(base) for theta in models]


def count(fraction: float, n: int) -> int:
    """floor(fraction * n)."""
    return math.floor(float(fraction) * n)


def largest(scores: Array, k: int) -> Flags:
    """Marks the k largest scores; of equal ones the lower flat index."""
    order = np.argsort(-scores.ravel(), kind="stable")
    keep = np.zeros(scores.size, dtype=bool)
    keep[order[:k]] = True
    return keep.reshape(scores.shape)


def masked(d: Array, keep: Flags, rescale: Rescale, density: float) -> Array:
    """`d` where `keep`, else 0, times the rescaling factor (1 where it would divide by 0)."""
    left = np.where(keep, d, 0.0)
    before, after = {
        None: (1.0, 1.0),
        "paper": (1.0, float(density)),
        "l1": (float(np.abs(d).sum()), float(np.abs(left).sum())),
    }[rescale]
    return left * (before / after if after > 0 else 1.0)


def summed(deltas: Sequence[Array], weight: Numbers, normalize: bool) -> Array:
    """sum_i w_i d_i, over sum_i w_i if `normalize`; |sum_i w_i| < 1e-8 divides by 1."""
    weights = per_model(weight, len(deltas))
    total = np.zeros_like(deltas[0])
    for w, d in zip(weights, deltas, strict=True):
        total = total + w * d
    return total / divisor_of_weights(weights) if normalize else total


def elected(
    deltas: Sequence[Array], weight: Numbers, normalize: bool, divisor: Divisor = "absolute"
) -> Array:
    """sum_i w_i d_i m_i / D with m_i = [sign(w_i d_i) = sign(sum_i w_i d_i)], entry by entry.

    A sum of 0 elects +; an entry of 0 agrees with nobody. D is sum_i |w_i| m_i ("absolute") or
    sum_i w_i m_i ("signed"), and 1 without `normalize` or where |D| < 1e-8; for "signed" also
    where |D| < 1e-6 * sum_i |w_i|, the sum over all models.
    """
    weights = per_model(weight, len(deltas))
    weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1.0, -1.0)
    agree = [np.sign(wd) == sign for wd in weighted]
    numerator = sum((wd * m for wd, m in zip(weighted, agree, strict=True)), np.zeros_like(sign))
    if not normalize:
        return numerator
    parts = np.abs(weights) if divisor == "absolute" else weights
    total = sum((w * m for w, m in zip(parts, agree, strict=True)), np.zeros_like(sign))
    least = 1e-8 if divisor == "absolute" else max(1e-8, 1e-6 * float(np.abs(weights).sum()))
    return numerator / np.where(np.abs(total) < least, 1.0, total)


def on_whole_vector(
    merge: Callable[[Array, list[Array]], Array], base: Tensors, models: Sequence[Tensors]
) -> Tensors:
    """Merges the concatenation of all tensors, in the base's order, and cuts it up again."""
    merged = merge(_flat(base, base), [_flat(model, base) for model in models])
    ends = np.cumsum([f64(base[name]).size for name in base])[:-1]
    parts = np.split(merged, ends)
    return {n: p.reshape(np.shape(base[n])) for n, p in zip(base, parts, strict=True)}


def _dropped(
    base: Array,
    models: Sequence[Array],
    density: Numbers,
    masks: Sequence[Flags],
    rescale: Rescale,
) -> list[Array]:
    densities = per_model(density, len(models))
    return [
        masked(d, np.asarray(keep, dtype=bool), rescale, p)
        for d, keep, p in zip(deltas_of(base, models), masks, densities, strict=True)
    ]


def _flat(tensors: Tensors, order: Tensors) -> Array:
    return np.concatenate([f64(tensors[name]).ravel() for name in order])
