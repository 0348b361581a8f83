"""Task-vector merges that mergekit does not have."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ._types import Array, Flags, Numbers, Tensors, f64, per_model
from .task_vectors import count, deltas_of, largest, on_whole_vector, summed


class Emr(NamedTuple):
    """One unified task vector, and per task a mask and a factor that adapt it."""

    unified: Tensors
    masks: list[dict[str, Flags]]
    rescalers: list[float]


def magmax(base: Array, models: Sequence[Array], scale: float = 1.0) -> Array:
    """Per entry the d_i of largest |d_i|; of equal ones the first model's (Marczak et al. 2024)."""
    deltas = np.stack(deltas_of(base, models))
    winner = np.argmax(np.abs(deltas), axis=0)
    return f64(base) + scale * np.take_along_axis(deltas, winner[None], axis=0)[0]


def tall_masks(
    base: Array, models: Sequence[Array], threshold: Numbers = 0.4, weight: Numbers = 1.0
) -> list[Flags]:
    """m_t = [|d_t| > lambda_t |d_mtl - d_t|], d_mtl = sum_i w_i d_i (Wang et al. 2024).

    Strict: an entry that no model moved is in no mask.
    """
    deltas = deltas_of(base, models)
    merged = summed(deltas, weight, normalize=False)
    thresholds = per_model(threshold, len(models))
    return [np.abs(d) > x * np.abs(merged - d) for d, x in zip(deltas, thresholds, strict=True)]


def consensus(
    base: Array,
    models: Sequence[Array],
    threshold: Numbers = 0.4,
    minimum: int = 2,
    weight: Numbers = 1.0,
    scale: float = 1.0,
) -> Array:
    """theta_0 + scale * d_mtl where at least `minimum` TALL masks agree (Wang et al. 2024)."""
    masks = tall_masks(base, models, threshold, weight)
    votes = np.sum(np.stack(masks), axis=0)
    merged = summed(deltas_of(base, models), weight, normalize=False)
    return f64(base) + scale * np.where(votes >= minimum, merged, 0.0)


def pcb(base: Array, models: Sequence[Array], ratio: Numbers = 0.1, scale: float = 1.0) -> Array:
    """theta_0 + scale * sum_i b_i d_i / sum_i b_i, b_i the kept scores (Du et al. 2024).

    Score exp(T norm(|d_i|)^2) tanh(d_i sum_j d_j), norm from [min, max] onto [0, 1] (0 if they are
    equal); each model keeps its floor(ratio_i * n) highest. Ambiguous in the paper (softmaxes) and
    its code (scores shifted to 0 at the cut): here kept scores count as they are, negative ones
    not at all, and entries that nobody keeps stay at theta_0.
    """
    deltas = deltas_of(base, models)
    total = sum(deltas, np.zeros_like(f64(base)))
    numerator, divisor = np.zeros_like(total), np.zeros_like(total)
    for d, share in zip(deltas, per_model(ratio, len(deltas)), strict=True):
        score = np.exp(len(deltas) * _onto_unit(np.abs(d)) ** 2) * np.tanh(d * total)
        kept = np.where(largest(score, count(share, d.size)), np.maximum(score, 0.0), 0.0)
        numerator, divisor = numerator + kept * d, divisor + kept
    return f64(base) + scale * numerator / np.where(divisor > 0, divisor, 1.0)


def pcb_model_scope(
    base: Tensors, models: Sequence[Tensors], ratio: Numbers = 0.1, scale: float = 1.0
) -> Tensors:
    """`pcb` over the whole vector of each model, as published."""
    return on_whole_vector(lambda b, m: pcb(b, m, ratio, scale), base, models)


def emr(base: Tensors, models: Sequence[Tensors], means: bool = False) -> Emr:
    """Elect, mask and rescale (Huang et al. 2024).

    Unified: g * max |d_t| over the d_t of sign g, g = sign(sum_t d_t), 0 counted as +. Mask:
    d_t g > 0. Rescaler: sum |d_t| / sum |mask * unified| over the whole model (1 if that is 0);
    `means` sums each tensor's mean instead of its entries, as the published code does.
    """
    unified: Tensors = {}
    masks: list[dict[str, Flags]] = [{} for _ in models]
    before, after = np.zeros(len(models)), np.zeros(len(models))
    for name in base:
        deltas = deltas_of(base[name], [model[name] for model in models])
        sign = np.where(sum(deltas, np.zeros_like(f64(base[name]))) >= 0, 1.0, -1.0)
        aligned = [np.where(d * sign > 0, np.abs(d), 0.0) for d in deltas]
        unified[name] = sign * np.max(np.stack(aligned), axis=0)
        share = 1 / max(sign.size, 1) if means else 1.0
        for t, d in enumerate(deltas):
            masks[t][name] = d * sign > 0
            before[t] += share * float(np.abs(d).sum())
            after[t] += share * float(np.abs(unified[name] * masks[t][name]).sum())
    factors = [float(b / a) if a > 0 else 1.0 for b, a in zip(before, after, strict=True)]
    return Emr(unified, masks, factors)


def emr_task(base: Tensors, merged: Emr, task: int) -> Tensors:
    """Task t's model: theta_0 + rescaler_t * mask_t * unified."""
    return {
        name: f64(base[name]) + merged.rescalers[task] * merged.masks[task][name] * d
        for name, d in merged.unified.items()
    }


def lines(
    base: Array,
    models: Sequence[Array],
    layer: int,
    layers: int,
    alpha: float,
    beta: float,
    weight: Numbers = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
) -> Array:
    """Task arithmetic times alpha + beta * l / (L - 1) in layer l = 0 .. L - 1 (Wang et al. 2025).

    A model of one layer counts as its first: alpha.
    """
    factor = alpha + beta * layer / max(layers - 1, 1)
    return f64(base) + scale * factor * summed(deltas_of(base, models), weight, normalize)


def metagpt_weights(base: Tensors, models: Sequence[Tensors]) -> Array:
    """lambda_t = |d_t|^2 / sum_j |d_j|^2 over the whole model (Zhou et al. 2024), 0 for 0 / 0."""
    energy = np.array(
        [sum(float(np.sum((f64(m[name]) - f64(base[name])) ** 2)) for name in base) for m in models]
    )
    total = float(energy.sum())
    return energy / total if total > 0 else np.zeros_like(energy)


def metagpt(base: Tensors, models: Sequence[Tensors], scale: float = 1.0) -> Tensors:
    """Task arithmetic with `metagpt_weights`."""
    weights = metagpt_weights(base, models)
    return {
        name: f64(theta)
        + scale * summed(deltas_of(theta, [m[name] for m in models]), weights, False)
        for name, theta in base.items()
    }


def wise_ft(base: Array, model: Array, t: float) -> Array:
    """(1 - t) theta_0 + t theta (Wortsman et al. 2022)."""
    return (1 - t) * f64(base) + t * f64(model)


def negmerge(base: Array, models: Sequence[Array], scale: float = 1.0) -> Array:
    """theta_0 + scale * mean_i d_i where all d_i have one sign, else theta_0 (Kim et al. 2024).

    The paper subtracts the merged vector to forget: scale -lambda. An entry that one model left as
    it was has no sign that all share.
    """
    deltas = np.stack(deltas_of(base, models))
    shared = np.abs(np.sign(deltas).sum(axis=0)) == len(deltas)
    return f64(base) + scale * np.where(shared, deltas.mean(axis=0), 0.0)


def median(models: Sequence[Array], weight: Numbers = 1.0) -> Array:
    """Per entry the point x with the least sum_i w_i |x - theta_i|; of an interval, its middle.

    Equal weights give the usual median, weights that are all 0 count as equal.
    """
    points = np.stack([f64(model) for model in models])
    weights = per_model(weight, len(models))
    weights = weights / weights.sum() if weights.sum() > 0 else np.ones(len(models))
    gaps = np.abs(points[:, None] - points[None])
    costs = np.tensordot(gaps, weights, axes=(1, 0))
    best = costs <= costs.min(axis=0) + 1e-9
    low = np.where(best, points, np.inf).min(axis=0)
    high = np.where(best, points, -np.inf).max(axis=0)
    return (low + high) / 2


def _onto_unit(x: Array) -> Array:
    if x.size == 0:
        return x
    low, high = float(x.min()), float(x.max())
    return (x - low) / (high - low) if high > low else np.zeros_like(x)
