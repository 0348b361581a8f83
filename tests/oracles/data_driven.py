"""Merges weighted by what the models do on data. Linear layers are [out, in]."""

from collections.abc import Sequence

import numpy as np

from ._types import Array, Numbers, f64, per_model


def exact_fisher(gradients: Array, probabilities: Array) -> Array:
    """mean_x sum_c p_c (grad log p_c)^2, example by example.

    Args:
      gradients: [examples, classes, *shape], of log p(c | x).
      probabilities: [examples, classes], p(c | x).
    """
    total = np.zeros(np.shape(gradients)[2:])
    for rows, p in zip(f64(gradients), f64(probabilities), strict=True):
        for g, pc in zip(rows, p, strict=True):
            total = total + pc * g * g
    return total / max(len(gradients), 1)


def empirical_fisher(gradients: Array) -> Array:
    """mean_x (grad log p(y | x))^2 over gradients [examples, *shape], each squared by itself."""
    return np.sum(f64(gradients) ** 2, axis=0) / max(len(gradients), 1)


def fisher(
    models: Sequence[Array],
    fishers: Sequence[Array],
    weight: Numbers = 1.0,
    floor: float = 1e-6,
) -> Array:
    """sum_t w_t F_t theta_t / sum_t w_t F_t, F floored entry by entry (Matena, Raffel 2022)."""
    numerator, divisor = np.zeros_like(f64(models[0])), np.zeros_like(f64(models[0]))
    for w, f, theta in zip(per_model(weight, len(models)), fishers, models, strict=True):
        precision = w * np.maximum(f64(f), floor)
        numerator, divisor = numerator + precision * f64(theta), divisor + precision
    mean = sum((f64(theta) for theta in models), 0 * numerator) / len(models)
    safe = np.abs(divisor) > 0
    return np.where(safe, numerator / np.where(safe, divisor, 1.0), mean)


def gram(inputs: Array) -> Array:
    """X^T X / n of X [n, in]."""
    x = f64(inputs)
    return x.T @ x / max(len(x), 1)


def regmean(
    models: Sequence[Array],
    grams: Sequence[Array],
    alpha: float = 0.9,
    weight: Numbers = 1.0,
    ridge: float = 0.0,
) -> Array:
    """W = (sum_t w_t W_t G_t') (sum_t w_t G_t' + ridge I)^+, W [out, in] (Jin et al. 2023).

    G_t' is G_t with its off-diagonal times `alpha`. The ridge pulls towards the mean weights:
    ridge * mean(W_t) joins the right-hand side, so that inputs never seen get the mean.
    """
    mean = sum((f64(m) for m in models), np.zeros_like(f64(models[0]))) / len(models)
    left = ridge * np.eye(mean.shape[1])
    right = ridge * mean
    for w, theta, g in zip(per_model(weight, len(models)), models, grams, strict=True):
        shrunk = w * (alpha * f64(g) + (1 - alpha) * np.diag(np.diag(f64(g))))
        left, right = left + shrunk, right + f64(theta) @ shrunk
    return mean + (right - mean @ left) @ np.linalg.pinv(left, hermitian=True)


def mats(
    models: Sequence[Array],
    inputs: Sequence[Array],
    outputs: Sequence[Array] | None = None,
    start: Array | None = None,
) -> Array:
    """Solve sum_t B_t W A_t = sum_t B_t W_t A_t for W [out, in] (Tam et al. 2024).

    A_t [in, in] and B_t [out, out] (identity if not given) are the Kronecker factors of task t's
    Fisher. Where the system is singular: the solution nearest to `start` (the mean), which is what
    conjugate gradients from there converge to.
    """
    shape = f64(models[0]).shape
    factors = [np.eye(shape[0])] * len(models) if outputs is None else outputs
    system = np.zeros((shape[0] * shape[1],) * 2)
    right = np.zeros(shape[0] * shape[1])
    for theta, a, b in zip(models, inputs, factors, strict=True):
        block = np.kron(f64(b), f64(a).T)
        system, right = system + block, right + block @ f64(theta).ravel()
    mean = sum((f64(m) for m in models), np.zeros(shape)) / len(models)
    x = (mean if start is None else f64(start)).ravel()
    return (x + np.linalg.pinv(system, hermitian=True) @ (right - system @ x)).reshape(shape)


def wudi(base: Array, models: Sequence[Array], scale: float = 1.0) -> Array:
    """theta_0 + scale * argmin_d sum_t |(d - d_t) d_t^T|^2 / |d_t|^2, d [out, in].

    Cheng et al. 2025. d = (sum_t d_t C_t) (sum_t C_t)^+, C_t = d_t^T d_t / |d_t|^2; a zero task
    vector is left out. Every d_t lies in the span of sum_t C_t, so the smallest solution is also
    the limit of gradient descent from sum_t d_t. Matrices only.
    """
    origin = f64(base)
    left, right = np.zeros((origin.shape[1],) * 2), np.zeros_like(origin)
    for theta in models:
        d = f64(theta) - origin
        energy = float(np.sum(d * d))
        if energy > 0:
            c = d.T @ d / energy
            left, right = left + c, right + d @ c
    return origin + scale * right @ np.linalg.pinv(left, rcond=1e-10, hermitian=True)


def uncertainty(
    base: Array,
    models: Sequence[Array],
    curvatures: Sequence[Array],
    prior: Array,
    weight: Numbers = 1.0,
) -> Array:
    """theta_0 + sum_t w_t (H_0 + H_t) d_t / (H_0 + sum_t w_t H_t), diagonal (Daheim et al. 2024).

    H_0 is the base's curvature, its prior precision included; an entry without any stays.
    """
    origin, h0 = f64(base), f64(prior)
    numerator, divisor = np.zeros_like(origin), h0 + np.zeros_like(origin)
    for w, theta, h in zip(per_model(weight, len(models)), models, curvatures, strict=True):
        numerator = numerator + w * (h0 + f64(h)) * (f64(theta) - origin)
        divisor = divisor + w * f64(h)
    return origin + numerator / np.where(divisor > 0, divisor, 1.0)
