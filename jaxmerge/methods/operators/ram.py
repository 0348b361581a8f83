"""Reinforced Agent Merging: what one model alone has moved is not averaged away."""

import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp

from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Sums, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.registry import register

EPSILON = Hyperparameter(
    1e-5,
    0.0,
    float("inf"),
    "change from which an entry counts as moved",
    differentiable=False,
    search=(0.0, 1e-3),
)


@register
def ram() -> MergeMethod:
    r"""RAM: where one model has moved an entry, its change; where several have, the mean of theirs.

    .. math:: \theta = \theta_0 + \frac{\sum_i m_i d_i}{\max(1, \sum_i m_i)}, \quad m_i = [|d_i| > \epsilon]

    Returns:
      A `MergeMethod` with the hyperparameter epsilon. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.0, 4.0])}
      >>> jm.merge("ram", [a, b], base=base)["w"]
      Array([1., 3.], dtype=float32)

    Reference:
      Reinforced Agent Merging, 2026 (arXiv 2601.13572).
    """
    leaf = LeafMethod("ram", _merge, MappingProxyType({"epsilon": EPSILON}))
    return from_leaf(leaf, summary="Mean of the changes over the models that made them.")


@register
def ramplus_tl() -> MergeMethod:
    r"""RAM+ (tensor-local): RAM, with what a model alone has moved scaled up for what it shares.

    .. math:: \theta = \theta_0 + \textstyle\sum_i m_i d_i \begin{cases}
       1 + r \, \mathrm{clip}(S_i / U_i, 0, \alpha) & \sum_j m_j = 1 \\ 1 / \sum_j m_j & \text{else} \end{cases}

    S_i counts, in the tensor, the entries that model i has moved with others, U_i those that it alone has.

    Returns:
      A `MergeMethod` with hyperparameters r, alpha, epsilon. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.0, 4.0])}
      >>> jm.merge("ramplus_tl", [a, b], base=base, r=1.0, alpha=0.5)["w"]
      Array([1.5, 3. ], dtype=float32)

    Reference:
      Reinforced Agent Merging, 2026 (arXiv 2601.13572).
    """
    infinity = float("inf")
    hyperparams = {
        "r": Hyperparameter(
            0.1, 0.0, infinity, "strength of the scaling of lone changes", search=(0.0, 1.0)
        ),
        "alpha": Hyperparameter(
            0.2, 0.0, infinity, "largest ratio of shared to lone changes", search=(0.0, 1.0)
        ),
        "epsilon": EPSILON,
    }
    leaf = LeafMethod(
        "ramplus_tl",
        _merge,
        MappingProxyType(hyperparams),
        (Sums("factor", _count, _factors),),
    )
    return from_leaf(leaf, summary="RAM, with the changes of one model alone scaled up.")


def _moved(chunk: Chunk, values: Values) -> tuple[list[jax.Array], jax.Array]:
    """Per model which entries it has moved, and how many models have."""
    moved = [jnp.abs(delta) > values["epsilon"] for delta in chunk.deltas()]
    return moved, functools.reduce(jnp.add, [one.astype(jnp.int32) for one in moved])


def _count(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    """uint32 [models, 2]: entries moved with others, and alone."""
    moved, number = _moved(chunk, values)
    pairs = [(one & (number > 1), one & (number == 1)) for one in moved]
    return jnp.stack([jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in pair]) for pair in pairs])


def _factors(sums: jax.Array, values: Values, found: Found) -> jax.Array:
    shared, alone = sums[:, 0].astype(jnp.float32), sums[:, 1].astype(jnp.float32)
    return 1.0 + values["r"] * jnp.minimum(shared / jnp.maximum(alone, 1.0), values["alpha"])


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    moved, number = _moved(chunk, values)
    parts = []
    for i, (delta, one) in enumerate(zip(chunk.deltas(), moved, strict=True)):
        lone = found["factor"][i] * delta if "factor" in found else delta
        shared = delta / jnp.maximum(number, 1).astype(delta.dtype)
        parts.append(jnp.where(one, jnp.where(number == 1, lone, shared), 0.0))
    return chunk.with_base(functools.reduce(jnp.add, parts))
