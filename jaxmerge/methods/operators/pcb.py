"""PCB: parameters compete within their task and across tasks."""

import functools
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Local, Select, Sums, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import SCALE
from jaxmerge.methods.registry import register

# The exponent of more models than this is shifted, which no ratio of scores shows: the sums stay far inside float32.
HIGHEST = 40.0


@register
def pcb(*, scope: Literal["model", "tensor"] = "model") -> MergeMethod:
    r"""PCB: averages task vectors by scores that reward large entries and agreement with the other tasks.

    .. math:: \theta = \theta_0 + \lambda \frac{\sum_i b_i d_i}{\sum_i b_i}, \quad
       b_i = \mathrm{top}_{\rho} \max(0, s_i), \quad
       s_i = \exp\!\left(T u_i^2\right) \tanh\!\Big(d_i \textstyle\sum_j d_j\Big), \quad
       u_i = \frac{|d_i| - \min |d_i|}{\max |d_i| - \min |d_i|}

    for T models, u = 0 where all entries are equal. Each model keeps its floor(ratio * n) highest scores, of equal ones
    the lower index. Entries that no model keeps, or that none scores above 0, stay at the base's.

    Args:
      scope: n, min and max are those of the whole "model" (the paper) or of each "tensor".

    Returns:
      A `MergeMethod` with hyperparameters ratio [models], scale. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -1.0])}
      >>> jm.merge("pcb", [a, b], base=base, ratio=0.5)["w"].round(2)
      Array([3., 2.], dtype=float32)

    Reference:
      Du et al., Parameter Competition Balancing for Model Merging, NeurIPS 2024. Kept scores count as they are; the
      published code shifts them so that the lowest kept one is 0.
    """
    ratio = Hyperparameter(
        0.1,
        0.0,
        1.0,
        "share of each task vector's entries that is kept, by score",
        "model",
        "fraction",
        False,
        search=(0.0, 0.5),
        share_of=scope,
    )
    measures = (
        Sums(
            "extent",
            _extents,
            lambda sums, values, found: sums,
            needs_values=False,
            scope=scope,
            reduce="max",
        ),
        # The scores are computed once: the exponential rounds differently from one program to the next.
        Local("score", _scores, of="extent"),
        Select(
            "selection",
            lambda chunk, scores: scores,
            lambda values, size: [(count,) for count in values["ratio"].count],
            scope,
            of="score",
        ),
    )
    leaf = LeafMethod("pcb", _merge, MappingProxyType({"ratio": ratio, "scale": SCALE}), measures)
    return from_leaf(leaf, summary="Mean of the entries that compete best, by their scores.")


def _extents(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    """[models, 2]: the largest magnitude, and the smallest, negated."""
    sizes = [jnp.abs(delta) for delta in chunk.deltas()]
    return jnp.stack([jnp.stack([jnp.max(size), jnp.max(-size)]) for size in sizes])


def _scores(chunk: Chunk, extent: jax.Array) -> list[jax.Array]:
    """Per model, max(0, score), float32."""
    deltas = chunk.deltas()
    # Behind the barrier the sum is computed once, not again for each model.
    total = jax.lax.optimization_barrier(functools.reduce(jnp.add, deltas))
    scores = []
    for i, delta in enumerate(deltas):
        high, low = extent[i, 0], -extent[i, 1]
        place = (jnp.abs(delta) - low) / jnp.where(high > low, high - low, 1.0)
        power = len(deltas) * place * place - max(0.0, len(deltas) - HIGHEST)
        score = jnp.maximum(jnp.exp(power) * jnp.tanh(delta * total), 0.0)
        scores.append(score.astype(jnp.float32))
    # Inside one program, too, selecting and keeping must see the same numbers.
    return jax.lax.optimization_barrier(scores)


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    weights = [
        jnp.where(chunk.keep(score, selection), score, 0.0)
        for score, (selection,) in zip(found["score"], found["selection"], strict=True)
    ]
    parts = [weight * delta for weight, delta in zip(weights, chunk.deltas(), strict=True)]
    divisor = functools.reduce(jnp.add, weights)
    merged = functools.reduce(jnp.add, parts) / jnp.where(divisor > 0, divisor, 1.0)
    return chunk.with_base(values["scale"] * merged)
