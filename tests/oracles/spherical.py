"""Interpolation on spheres: directions move along great circles."""

import math

import numpy as np

from ._types import Array, f64

ALIGNED = 0.9995
"""Above this |cos| the angle is too small to divide by its sine: interpolate linearly."""


def slerp(base: Array, model: Array, t: float, dialect: bool = False) -> Array:
    """sin((1-t) a) / sin(a) * theta_0 + sin(t a) / sin(a) * theta_1, a their angle (Shoemake 1985).

    One angle for the whole tensor. Linear where |cos a| > .9995 or either norm is 0; mergekit
    (`dialect`) takes a right angle for a zero norm.
    """
    v0, v1 = f64(base), f64(model)
    norms = float(np.linalg.norm(v0.ravel()) * np.linalg.norm(v1.ravel()))
    cos = float(np.sum(v0 * v1)) / norms if norms > 0 else (0.0 if dialect else 1.0)
    if abs(cos) > ALIGNED:
        return (1 - t) * v0 + t * v1
    angle = math.acos(cos)
    return (math.sin((1 - t) * angle) * v0 + math.sin(t * angle) * v1) / math.sin(angle)
