"""Spherical interpolation."""

import functools
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Sums, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.registry import register

# Beyond this cosine the arc is a line to float32, and near -1 it is not unique.
PARALLEL = 0.9995


@register
def slerp(*, zero_norm: Literal["line", "arc"] = "line") -> MergeMethod:
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
      >>> jm.merge("slerp", [b], base=a, t=0.5)["w"]
      Array([0.70710677, 0.70710677], dtype=float32)

    Reference:
      Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    hyperparams = {
        "t": Hyperparameter(
            0.5, -float("inf"), float("inf"), "place on the arc: 0 base, 1 model", search=(0.0, 1.0)
        )
    }
    measure = Sums("arc", _products, functools.partial(_angle, zero_norm), needs_values=False)
    leaf = LeafMethod(
        "slerp",
        _interpolate,
        MappingProxyType(hyperparams),
        (measure,),
        base="source",
        models=(2, 2),
    )
    return from_leaf(leaf, summary="Spherical interpolation between two models.")


def _products(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    """[3]: the inner product and the two squared norms."""
    a, b = chunk.sources()
    return jnp.stack([jnp.sum(a * b), jnp.sum(a * a), jnp.sum(b * b)])


def _angle(zero_norm: str, sums: jax.Array, values: Values, found: Found) -> dict[str, Any]:
    norms = jnp.sqrt(sums[1]) * jnp.sqrt(sums[2])
    undefined = 1.0 if zero_norm == "line" else 0.0
    cosine = jnp.where(norms > 0, sums[0] / jnp.where(norms > 0, norms, 1.0), undefined)
    curved = jnp.abs(cosine) <= PARALLEL
    return {"curved": curved, "angle": jnp.arccos(jnp.where(curved, cosine, 0.0))}


def _interpolate(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    t, curved, angle = values["t"], found["arc"]["curved"], found["arc"]["angle"]
    first = jnp.where(curved, jnp.sin((1 - t) * angle) / jnp.sin(angle), 1 - t)
    second = jnp.where(curved, jnp.sin(t * angle) / jnp.sin(angle), t)
    a, b = chunk.sources()
    return first * a + second * b
