"""WUDI: the one task vector that interferes least with the inputs that the task vectors themselves stand for."""

import functools
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxmerge.methods.factorisations import svd
from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Local, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.task_vectors import SCALE
from jaxmerge.methods.registry import register

# Directions that the task vectors, each at norm 1, hold less of than this share of the strongest count as none.
LEAST = 1e-5


@register
def wudi(
    *, solver: Literal["exact", "adam"] = "exact", steps: int = 300, learning_rate: float = 1e-5
) -> MergeMethod:
    r"""WUDI merging: minimises the interference of the merged task vector with each task's, without data.

    .. math:: \theta = \theta_0 + \lambda \arg\min_d \sum_t \frac{\|(d - d_t)\, d_t^T\|_F^2}{\|d_t\|_F^2}

    for every matrix d [outputs, inputs]; other tensors get the mean of their task vectors. The problem is quadratic.
    With the task vectors over their norms stacked as M = U S V^T and K = [d_t d_t^T / |d_t|]_t side by side, the
    smallest solution is K U S^+ V^T. It is found once, in `init`; a task vector that is zero is left out.

    Args:
      solver: "exact", or "adam": `steps` of Adam from the sum of the task vectors, as published.
      steps: of Adam.
      learning_rate: of Adam.

    Returns:
      A `MergeMethod` with hyperparameter scale. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = {"w": jnp.zeros((1, 2))}, {"w": jnp.array([[2.0, 0.0]])}, {"w": jnp.array([[0.0, 3.0]])}
      >>> jm.merge("wudi", [a, b], base=base)["w"].round(4)
      Array([[2., 3.]], dtype=float32)

    Reference:
      Cheng et al., Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors,
      ICML 2025.
    """
    if solver == "adam" and steps < 1:
        raise ValueError(f"wudi: steps must be at least 1, found {steps}")

    def solve(chunk: Chunk) -> jax.Array:
        if len(chunk.shape) != 2:
            return functools.reduce(jnp.add, chunk.deltas()) / len(chunk.models)
        deltas = jnp.stack([chunk.as_matrix(delta) for delta in chunk.deltas()])
        solved = _exact(deltas) if solver == "exact" else _adam(deltas, steps, learning_rate)
        return chunk.from_matrix(solved)

    leaf = LeafMethod(
        "wudi",
        _merge,
        MappingProxyType({"scale": SCALE}),
        (Local("solution", solve),),
        cuts="never",
    )
    return from_leaf(leaf, summary="Task vector of least interference, solved without data.")


def _merge(chunk: Chunk, values: Values, found: Found) -> jax.Array:
    return chunk.with_base(values["scale"] * found["solution"])


def _units(deltas: jax.Array) -> jax.Array:
    """Task vectors [models, outputs, inputs] over their norms; zero ones stay zero."""
    largest = jnp.max(jnp.abs(deltas), axis=(1, 2), keepdims=True)
    scaled = deltas / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.sqrt(jnp.sum(scaled * scaled, axis=(1, 2), keepdims=True))
    return scaled / jnp.where(norm > 0, norm, 1.0)


def _exact(deltas: jax.Array) -> jax.Array:
    models, outputs, inputs = deltas.shape
    units = _units(deltas)
    u, s, vt = svd(units.reshape(models * outputs, inputs))
    kept = s > LEAST * s[0]
    inverse = jnp.where(kept, 1.0 / jnp.where(kept, s, 1.0), 0.0)
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    # One model after the other: [d_1 M_1^T ... d_T M_T^T] U = sum_t d_t M_t^T U_t.
    blocks = u.reshape(models, outputs, s.shape[0])
    projected = sum(
        product(delta, product(unit.T, block))
        for delta, unit, block in zip(deltas, units, blocks, strict=True)
    )
    return product(projected * inverse[None], vt)


def _adam(deltas: jax.Array, steps: int, learning_rate: float) -> jax.Array:
    # Loaded where it is needed: importing the package stays quick.
    import optax

    units = _units(deltas)
    optimizer = optax.adam(learning_rate)

    def loss(solution: jax.Array) -> jax.Array:
        gaps = jnp.einsum(
            "toi,tpi->top", solution[None] - deltas, units, precision=lax.Precision.HIGHEST
        )
        return jnp.sum(gaps * gaps)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        solution, state = carry
        updates, state = optimizer.update(jax.grad(loss)(solution), state)
        return (optax.apply_updates(solution, updates), state), None

    start = jnp.sum(deltas, axis=0)
    (solution, _), _ = lax.scan(step, (start, optimizer.init(start)), length=steps)
    return solution
