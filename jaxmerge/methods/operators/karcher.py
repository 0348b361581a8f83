"""The Karcher mean."""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Sums, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators import angles
from jaxmerge.methods.registry import register

# Float32 gains nothing from more.
STEPS = 64


@register
def karcher() -> MergeMethod:
    r"""Mean of the models' directions on the sphere, found step by step, times the mean of their norms.

    .. math:: \theta = \mu \, \tfrac{1}{N} \textstyle\sum_i \|\theta_i\|, \quad
       \mu \leftarrow \exp_\mu\!\Big(\tfrac{1}{N} \textstyle\sum_i \log_\mu u_i\Big), \quad
       u_i = \theta_i / \|\theta_i\|

    The steps begin at the normalised mean of the directions and end after `max_iter` (at most 64), or before one that
    is shorter than `tol`. A zero tensor has no direction and counts in the mean norm only. Where the directions cancel
    (their mean is shorter than a thousandth) there is no unique mean: the result is the arithmetic mean of the tensors.

    Returns:
      A `MergeMethod` with hyperparameters max_iter and tol. A base is one more model.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> a, b = {"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 4.0])}
      >>> print(jm.merge("karcher", [a, b])["w"].round(2))
      [2.12 2.12]

    Reference:
      Grove and Karcher, How to conjugate C1-close group actions, Mathematische Zeitschrift 1973.
    """
    hyperparams = {
        "max_iter": Hyperparameter(
            10.0,
            0.0,
            1e9,
            "how many steps at most",
            kind="index",
            differentiable=False,
            search=(1.0, 20.0),
        ),
        "tol": Hyperparameter(
            1e-5,
            0.0,
            float("inf"),
            "length of a step that is not made any more",
            differentiable=False,
            search=(0.0, 1e-3),
        ),
    }
    leaf = LeafMethod(
        "karcher",
        _mean,
        MappingProxyType(hyperparams),
        (Sums("products", _products, lambda sums, values, found: sums, needs_values=False),),
        base="source",
    )
    return from_leaf(leaf, summary="Mean of directions on the sphere, times the mean norm.")


def _products(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    return angles.products(chunk.sources())


def _mean(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    norms, cosine = angles.cosines(found["products"])
    present = norms > 0
    share = present / jnp.maximum(jnp.sum(present), 1).astype(norms.dtype)
    square = angles.form(share, cosine, share)
    defined = square > angles.RESOLUTION
    start = share / jnp.sqrt(jnp.where(defined, square, 1.0))

    # As many turns as there can be: a loop of fixed length has a gradient.
    def turn(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        point, done = state
        along = angles.tangent(point, share, cosine)
        further, length = angles.moved(point, along, cosine)
        square = angles.form(further, cosine, further)
        further = further / jnp.sqrt(jnp.where(square > 0, square, 1.0))
        done = done | (i >= values["max_iter"]) | (length < values["tol"])
        return jnp.where(done, point, further), done

    point, _ = jax.lax.fori_loop(0, STEPS, turn, (start, ~defined))
    whole = jnp.mean(norms) * point / jnp.where(present, norms, 1.0)
    share = jnp.where(defined, whole, 1.0 / len(chunk.models))
    return functools.reduce(jnp.add, [share[i] * x for i, x in enumerate(chunk.sources())])
