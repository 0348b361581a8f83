"""Averages of the parameters themselves, no base subtracted."""

from collections.abc import Sequence

import numpy as np

from ._types import Array, Numbers, f64, per_model


def linear(models: Sequence[Array], weight: Numbers = 1.0, normalize: bool = True) -> Array:
    """Weighted sum: sum_i w_i theta_i, divided by sum_i w_i if `normalize` (Wortsman et al. 2022).

    A sum of weights below 1e-8 in magnitude divides by 1.
    """
    weights = per_model(weight, len(models))
    total = np.zeros_like(f64(models[0]))
    for w, theta in zip(weights, models, strict=True):
        total = total + w * f64(theta)
    return total / divisor_of_weights(weights) if normalize else total


def divisor_of_weights(weights: Array) -> float:
    """sum_i w_i, or 1 where its magnitude is below 1e-8."""
    total = float(np.sum(weights))
    return 1.0 if abs(total) < 1e-8 else total


def running_mean(models: Sequence[Array]) -> Array:
    """Arithmetic mean of all points of a run: uniform soup, SWA (Izmailov et al. 2018)."""
    return linear(models)


def ema(models: Sequence[Array], decay: float) -> Array:
    """e_0 = theta_0, e_t = decay e_{t-1} + (1 - decay) theta_t."""
    average = f64(models[0])
    for theta in models[1:]:
        average = decay * average + (1 - decay) * f64(theta)
    return average


def lawa(models: Sequence[Array], last: int) -> Array:
    """Mean of the last k points, or of all while there are fewer (Kaddour 2022)."""
    return linear(models[-last:])
