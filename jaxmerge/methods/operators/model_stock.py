"""Model Stock: how far the mean of fine-tuned models may be trusted, from the angles between them."""

import functools
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Local, Measure, Sums, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators import angles
from jaxmerge.methods.operators.task_vectors import SCALE
from jaxmerge.methods.registry import register

Guard = Literal["clamp", "floor"]


@register
def model_stock(
    *, over: Literal["tensor", "last"] = "tensor", guard: Guard = "clamp"
) -> MergeMethod:
    r"""Model Stock: the mean of the models, drawn back to the base the more, the less they agree.

    .. math:: \theta = \theta_0 + \lambda t (\bar\theta - \theta_0), \quad t = \frac{N c}{1 + (N - 1) c}, \quad
       c = \mathrm{mean}_{i<j} \cos(d_i, d_j)

    One model gives t = 1. A pair with a zero task vector counts as 0.

    Args:
      over: one angle for each "tensor", or for each vector along the "last" axis.
      guard: "clamp" takes t = 0 where c is negative: the formula leaves [0, 1] there and has a pole at -1 / (N - 1).
        "floor" leaves c as it is, and divides by the product of the norms or by 1e-6, whichever is larger.

    Returns:
      A `MergeMethod` with the hyperparameter scale. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([5.0, 0.0])}, {"w": jnp.array([3.0, 4.0])}
      >>> jm.merge("model_stock", [a, b], base=base)["w"].round(1)
      Array([3. , 1.5], dtype=float32)

    Reference:
      Jang et al., Model Stock: All we need is just a few fine-tuned models, ECCV 2024.
    """
    measure: Measure
    if over == "tensor":
        measure = Sums(
            "ratio",
            lambda chunk, values, found: angles.products(chunk.deltas()),
            lambda sums, values, found: _ratio(guard, sums),
            needs_values=False,
        )
    else:
        measure = Local("ratio", functools.partial(_ratio_of_rows, guard))
    leaf = LeafMethod(
        "model_stock",
        _merge,
        MappingProxyType({"scale": SCALE}),
        (measure,),
        cuts="elements" if over == "tensor" else "rows",
    )
    return from_leaf(leaf, summary="Mean of the models, drawn to the base by their angles.")


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    total = functools.reduce(jnp.add, chunk.deltas())
    return chunk.with_base(values["scale"] * (found["ratio"] * (total / len(chunk.models))))


def _ratio_of_rows(guard: Guard, chunk: Chunk) -> jax.Array:
    axis = -1 if chunk.models[0].ndim > 1 else None
    return _ratio(guard, angles.products(chunk.deltas(), axis))


def _ratio(guard: Guard, gram: jax.Array) -> Any:
    """t, from inner products [models, models, ...]."""
    count = gram.shape[0]
    norms = [angles.lengths(gram[i, i]) for i in range(count)]
    pairs = []
    for i in range(count):
        for j in range(i + 1, count):
            divisor = norms[i] * norms[j]
            divisor = (
                jnp.maximum(divisor, 1e-6)
                if guard == "floor"
                else jnp.where(divisor > 0, divisor, 1.0)
            )
            pairs.append(gram[i, j] / divisor)
    if not pairs:
        return jnp.ones_like(gram[0, 0])
    cosine = functools.reduce(jnp.add, pairs) / len(pairs)
    if guard == "clamp":
        cosine = jnp.clip(cosine, 0.0, 1.0)
    divisor = 1.0 + (count - 1) * cosine
    return count * cosine / jnp.where(jnp.abs(divisor) < 1e-6, 1e-6, divisor)
