"""Spherical interpolation between any number of models."""

import functools
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Sums, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators import angles
from jaxmerge.methods.registry import register


@register
def multislerp(*, tangent: Literal["arc", "chord"] = "arc") -> MergeMethod:
    r"""Weighted mean of directions on the sphere, in one step, times the weighted mean of the norms.

    .. math:: \theta = \exp_\mu\!\Big(\textstyle\sum_i w_i \log_\mu u_i\Big) \sum_i w_i \|\theta_i\|, \quad
       u_i = \theta_i / \|\theta_i\|, \quad \mu \propto \textstyle\sum_i w_i u_i

    With a base all of this happens to task vectors. A zero tensor has no direction and adds nothing to the sums over
    directions. Where the weighted directions cancel (their sum is shorter than `eps`, or than a thousandth of the sum
    of abs(w), which float32 cannot tell from 0) the result is the weighted sum of the tensors. Weights that sum to 0
    are not divided.

    Args:
      tangent: the logarithm is as long as the "arc"; "chord" takes u - <u, mu> mu, which is shorter (and sums to 0).

    Returns:
      A `MergeMethod` with hyperparameters weight [models], normalize_weights, eps. A base is optional.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b = {"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 4.0])}
      >>> print(jm.merge("multislerp", [a, b])["w"].round(2))
      [2.12 2.12]

    Reference:
      Buss and Fillmore, Spherical averages and applications to spherical splines and interpolation, ACM Transactions on
      Graphics 2001.
    """
    infinity = float("inf")
    hyperparams = {
        "weight": Hyperparameter(
            1.0, -infinity, infinity, "weight of each model", "model", search=(0.0, 1.0)
        ),
        "normalize_weights": Hyperparameter(
            1.0, 0.0, 1.0, "divide the weights by their sum", kind="flag", differentiable=False
        ),
        "eps": Hyperparameter(
            1e-8,
            0.0,
            infinity,
            "length below which the sum of the directions counts as 0",
            differentiable=False,
            search=(0.0, 1e-6),
        ),
    }
    leaf = LeafMethod(
        "multislerp",
        functools.partial(_interpolate, tangent == "arc"),
        MappingProxyType(hyperparams),
        (Sums("products", _products, lambda sums, values, found: sums, needs_values=False),),
        base="optional",
    )
    return from_leaf(leaf, summary="Spherical interpolation between any number of models.")


def _vectors(chunk: Chunk) -> list[jax.Array]:
    return chunk.sources() if chunk.base is None else chunk.deltas()


def _products(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    return angles.products(_vectors(chunk))


def _interpolate(arc: bool, chunk: Chunk, values: Values, found: Found) -> jax.Array:
    weight = values["weight"]
    total = jnp.sum(weight)
    vanishes = jnp.abs(total) <= 1e-6 * jnp.sum(jnp.abs(weight))
    weight = weight / jnp.where((values["normalize_weights"] > 0.5) & ~vanishes, total, 1.0)
    norms, cosine = angles.cosines(found["products"])
    present = norms > 0
    share = jnp.where(present, weight, 0.0)
    square = angles.form(share, cosine, share)
    least = angles.RESOLUTION * jnp.square(jnp.sum(jnp.abs(share)))
    defined = square > jnp.maximum(jnp.square(values["eps"]), least)
    middle = share / jnp.sqrt(jnp.where(defined, square, 1.0))
    along = angles.tangent(middle, share, cosine, arc=arc)
    point, _ = angles.moved(middle, along, cosine)
    length = jnp.sum(weight * norms)
    share = jnp.where(defined, length * point / jnp.where(present, norms, 1.0), weight)
    parts = [share[i] * vector for i, vector in enumerate(_vectors(chunk))]
    merged = functools.reduce(jnp.add, parts)
    return merged if chunk.base is None else chunk.with_base(merged)
