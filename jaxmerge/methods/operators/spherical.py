"""Spherical interpolation."""

import functools
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Cuts, Found, LeafMethod, Local, Measure, Sums, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.registry import register

ZeroNorm = Literal["line", "arc"]
Over = Literal["tensor", "last", "first"]

# Beyond this cosine the arc is a line, and near -1 it is not unique.
PARALLEL = 0.9995
# The same where the arc is followed as far as float32 can: a sine of 1e-3.
NEARLY_PARALLEL = 0.9999995


@register
def slerp(*, zero_norm: ZeroNorm = "line") -> MergeMethod:
    r"""Spherical linear interpolation between two models, tensor by tensor.

    .. math:: \theta = \frac{\sin((1-t)\varphi)}{\sin\varphi} \theta_a + \frac{\sin(t\varphi)}{\sin\varphi} \theta_b,
       \quad \cos\varphi = \frac{\langle\theta_a, \theta_b\rangle}{\|\theta_a\| \|\theta_b\|}

    Where the cosine is beyond 0.9995 in magnitude, or a norm is 0, the interpolation is linear.

    Args:
      zero_norm: a tensor of norm 0 is interpolated on the "line", or on the "arc" as if at a right angle.

    Returns:
      A `MergeMethod` with the hyperparameter t. It takes a base (t = 0) and one model (t = 1), or two models and no
      base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
      >>> print(jm.merge("slerp", [b], base=a, t=0.5)["w"].round(2))
      [0.71 0.71]

    Reference:
      Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    hyperparams = {
        "t": Hyperparameter(
            0.5, -float("inf"), float("inf"), "place on the arc: 0 base, 1 model", search=(0.0, 1.0)
        )
    }
    measure = Sums(
        "arc",
        lambda chunk, values, found: _products(chunk.sources()),
        lambda sums, values, found: _arc(sums, zero_norm, PARALLEL),
        needs_values=False,
    )
    leaf = LeafMethod(
        "slerp",
        _interpolate,
        MappingProxyType(hyperparams),
        (measure,),
        base="source",
        models=(2, 2),
    )
    return from_leaf(leaf, summary="Spherical interpolation between two models.")


@register
def nuslerp(*, over: Over = "tensor", zero_norm: ZeroNorm = "line") -> MergeMethod:
    r"""Spherical interpolation between two models, or their task vectors, at the place that their weights say.

    .. math:: \theta = \theta_0 + \frac{\sin((1-t)\varphi)}{\sin\varphi} d_1 + \frac{\sin(t\varphi)}{\sin\varphi} d_2,
       \quad t = \frac{w_2}{w_1 + w_2}

    Without a base theta_0 is 0. Weights that sum to 0 give t = 1/2. Where the sine of the angle is below 1e-3, or a
    norm is 0, the interpolation is linear.

    Args:
      over: one angle for the whole "tensor", or for each vector along the "last" or the "first" axis.
      zero_norm: a vector of norm 0 is interpolated on the "line", or on the "arc" as if at a right angle.

    Returns:
      A `MergeMethod` with the hyperparameter weight [models]. It takes two models; a base is optional.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
      >>> print(jm.merge("nuslerp", [a, b], weight=[1.0, 1.0])["w"].round(2))
      [0.71 0.71]

    Reference:
      Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    infinity = float("inf")
    hyperparams = {
        "weight": Hyperparameter(
            1.0, -infinity, infinity, "weight of each model", "model", search=(0.0, 1.0)
        )
    }
    measure: Measure
    if over == "tensor":
        measure = Sums(
            "arc",
            lambda chunk, values, found: _products(_vectors(chunk)),
            lambda sums, values, found: _arc(sums, zero_norm, NEARLY_PARALLEL),
            needs_values=False,
        )
    else:
        measure = Local("arc", functools.partial(_arc_of_rows, over, zero_norm))
    cuts: dict[Over, Cuts] = {"tensor": "elements", "last": "rows", "first": "never"}
    leaf = LeafMethod(
        "nuslerp",
        _interpolate_by_weight,
        MappingProxyType(hyperparams),
        (measure,),
        base="optional",
        models=(2, 2),
        cuts=cuts[over],
    )
    return from_leaf(leaf, summary="Spherical interpolation by weight, also of task vectors.")


def _products(vectors: list[jax.Array], axis: int | None = None) -> tuple[jax.Array, ...]:
    """The inner product and the two squared norms."""
    a, b = vectors
    return tuple(jnp.sum(x, axis=axis, keepdims=axis is not None) for x in (a * b, a * a, b * b))


def _arc(products: tuple[jax.Array, ...], zero_norm: ZeroNorm, straight: float) -> dict[str, Any]:
    norms = jnp.sqrt(products[1]) * jnp.sqrt(products[2])
    undefined = 1.0 if zero_norm == "line" else 0.0
    cosine = jnp.where(norms > 0, products[0] / jnp.where(norms > 0, norms, 1.0), undefined)
    curved = jnp.abs(cosine) <= straight
    return {"curved": curved, "angle": jnp.arccos(jnp.where(curved, cosine, 0.0))}


def _arc_of_rows(over: Over, zero_norm: ZeroNorm, chunk: Chunk) -> dict[str, Any]:
    axis = (0 if over == "first" else -1) if chunk.models[0].ndim else None
    return _arc(_products(_vectors(chunk), axis), zero_norm, NEARLY_PARALLEL)


def _vectors(chunk: Chunk) -> list[jax.Array]:
    return chunk.sources() if chunk.base is None else chunk.deltas()


def _interpolate(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    return _between(chunk.sources(), values["t"], found["arc"])


def _interpolate_by_weight(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    weight = values["weight"]
    total = jnp.sum(weight)
    vanishes = jnp.abs(total) <= 1e-6 * jnp.sum(jnp.abs(weight))
    t = jnp.where(vanishes, 0.5, weight[1] / jnp.where(vanishes, 1.0, total))
    merged = _between(_vectors(chunk), t, found["arc"])
    return merged if chunk.base is None else chunk.with_base(merged)


def _between(vectors: list[jax.Array], t: jax.Array, arc: dict[str, Any]) -> jax.Array:
    curved, angle = arc["curved"], arc["angle"]
    first = jnp.where(curved, jnp.sin((1 - t) * angle) / jnp.sin(angle), 1 - t)
    second = jnp.where(curved, jnp.sin(t * angle) / jnp.sin(angle), t)
    a, b = vectors
    return first * a + second * b
