"""Arcee Fusion."""

import math
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Local, Select, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.registry import register


@register
def arcee_fusion() -> MergeMethod:
    r"""Arcee Fusion: takes over from the model the entries of outstanding importance.

    .. math:: \theta = \theta_0 + d \, [I \ge Q_2 + f (Q_3 - Q_1)], \quad
       I = |d| \, \mathrm{KL}(\mathrm{softmax}(\theta) \,\|\, \mathrm{softmax}(\theta_0))

    The softmax runs over the last axis, 1e-8 is added to it, and there is one divergence per row. The quartiles are
    entries of the sorted I, at floor(x (n - 1)). Where nothing is important (I is 0 throughout) all of d is taken.

    Returns:
      A `MergeMethod` with the hyperparameter fence (f). It takes a base and one model.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a = {"w": jnp.zeros(5)}, {"w": jnp.array([0.1, 0.2, 9.0, 0.1, -0.2])}
      >>> jm.merge("arcee_fusion", [a], base=base)["w"]
      Array([0., 0., 9., 0., 0.], dtype=float32)

    Reference:
      Arcee.ai, Arcee Fusion in mergekit, 2025.
    """
    hyperparams = {
        "fence": Hyperparameter(
            1.5,
            0.0,
            float("inf"),
            "interquartile ranges above the median from which an entry is taken",
            differentiable=False,
            search=(0.0, 4.0),
        )
    }
    leaf = LeafMethod(
        "arcee_fusion",
        _fuse,
        MappingProxyType(hyperparams),
        (
            Local("importance", lambda chunk: [_importance(chunk)]),
            Select("quartiles", lambda chunk, importance: importance, _counts, of="importance"),
        ),
        models=(1, 1),
        cuts="rows",
    )
    return from_leaf(leaf, summary="Take over the entries of outstanding importance.")


def _counts(values: Values, size: int) -> list[tuple[jax.Array, ...]]:
    places = [math.floor(quarter * (size - 1)) for quarter in (0.25, 0.5, 0.75)]
    return [tuple(jnp.uint32(size - place) for place in places)]


def _fuse(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    ((lower, middle, upper),) = [
        [jax.lax.bitcast_convert_type(one.threshold, jnp.float32) for one in selections]
        for selections in found["quartiles"]
    ]
    (delta,) = chunk.deltas()
    (importance,) = found["importance"]
    taken = importance >= middle + values["fence"] * (upper - lower)
    return chunk.with_base(jnp.where(taken, delta, 0.0))


def _importance(chunk: Chunk) -> jax.Array:
    (delta,), (model,) = chunk.deltas(), chunk.sources()
    if delta.ndim == 0:
        return jnp.zeros((), jnp.float32)
    p = jax.nn.softmax(model, axis=-1) + 1e-8
    q = jax.nn.softmax(chunk.with_base(jnp.zeros_like(delta)), axis=-1) + 1e-8
    # sum p log(p / q), with what sums to 0 taken off each term: p and q differ little, and the plain terms would cancel
    # to noise in float32 where these are small from the start.
    r = (p - q) / q
    near = jnp.abs(r) < 0.03
    away = jnp.where(near, 1.0, r)
    series = r * r * (1 / 2 - r * (1 / 6 - r * (1 / 12 - r / 20)))
    terms = q * jnp.where(near, series, (1 + away) * jnp.log1p(away) - away)
    divergence = jnp.sum(terms, axis=-1, keepdims=True)
    return (jnp.abs(delta) * divergence).astype(jnp.float32)
