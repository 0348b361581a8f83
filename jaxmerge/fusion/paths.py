"""Losses along a line between two models and over a plane through three, each as one program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Loss = Callable[[Any], Any]
Prepare = Callable[[Any], Any]


def line(a: Any, b: Any, t: ArrayLike) -> Any:
    r"""The model between two others.

    .. math:: \theta(t) = (1 - t) a + t b

    Args:
      a, b: trees of one structure and shapes; what is not floating-point is taken from `a`.
      t: scalar; traced.

    Returns:
      A tree like `a`, its leaves in their own dtypes.

    Example:
      >>> line({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.25)["w"].tolist()
      [0.25, 0.25]
    """
    return affine((a, b), (1 - jnp.asarray(t), jnp.asarray(t)))


def path_losses(
    loss: Loss,
    a: Any,
    b: Any,
    *,
    points: int = 11,
    prepare: Prepare | None = None,
    batch_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""The loss at evenly spaced models between two, ends included.

    .. math:: L((1 - t) a + t b), \quad t = 0, \tfrac{1}{points - 1}, \ldots, 1

    One compiled program for all of them.

    Args:
      loss: a traceable function of a model, to a scalar or an array (one loss per task). The same function object
        shares the program.
      a, b: trees of parameters; running statistics are averaged like the rest unless `prepare` replaces them.
      points: how many models, 2 or more; static.
      prepare: a traceable function from a model to the one that is scored, such as
        `lambda model: jm.align.reset_batch_norm(apply_train, model, batches)`.
      batch_size: how many models are computed at once; by default one after the other. Static.

    Returns:
      t, [points], and the losses, [points, ...].

    Raises:
      ValueError: fewer than 2 points.

    Example:
      >>> t, losses = path_losses(lambda w: jnp.sum(w**2), jnp.array([0.0]), jnp.array([2.0]), points=3)
      >>> t.tolist(), losses.tolist()
      ([0.0, 0.5, 1.0], [0.0, 1.0, 4.0])

    Reference:
      Goodfellow et al., Qualitatively characterizing neural network optimization problems, ICLR 2015.
    """
    if points < 2:
        raise ValueError(f"a path has its two ends at least: expected points >= 2, found {points}")
    t = jnp.linspace(0, 1, points)
    weights = jnp.stack([1 - t, t], axis=1)
    return t, _losses(loss, prepare, batch_size, (a, b), weights)


def barrier(
    loss: Loss,
    a: Any,
    b: Any,
    *,
    points: int = 11,
    prepare: Prepare | None = None,
    batch_size: int | None = None,
) -> jax.Array:
    r"""How far the loss between two models rises above the line between their losses.

    .. math:: \sup_t \; L((1 - t) a + t b) - [(1 - t) L(a) + t L(b)]

    over evenly spaced t. It is 0 or more: at the ends the difference is 0.

    Args:
      Others: as for `path_losses`.

    Returns:
      float, of the shape of one loss.

    Raises:
      ValueError: fewer than 2 points.

    Example:
      >>> float(barrier(lambda w: (w[0] ** 2 - 1) ** 2, jnp.array([-1.0]), jnp.array([1.0])))
      1.0

    Reference:
      Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020. Entezari et al., The Role
      of Permutation Invariance in Linear Mode Connectivity of Neural Networks, ICLR 2022.
    """
    t, losses = path_losses(loss, a, b, points=points, prepare=prepare, batch_size=batch_size)
    t = jnp.reshape(t, (-1, *(1,) * (losses.ndim - 1)))
    ends = (1 - t) * losses[:1] + t * losses[-1:]
    return jnp.max(losses - ends, axis=0)


def plane_losses(
    loss: Loss,
    origin: Any,
    a: Any,
    b: Any,
    u: ArrayLike,
    v: ArrayLike,
    *,
    prepare: Prepare | None = None,
    batch_size: int | None = None,
) -> jax.Array:
    r"""The loss over a grid of the plane through three models.

    .. math:: L_{ij} = L(origin + u_j (a - origin) + v_i (b - origin))

    The three stand at (u, v) = (0, 0), (1, 0) and (0, 1). One compiled program.

    Args:
      origin, a, b: trees of parameters, such as two models and the aligned one, or a merge and its sources.
      u, v: [columns] and [rows], the grid's coordinates.
      Others: as for `path_losses`.

    Returns:
      [rows, columns, ...].

    Example:
      >>> w = jnp.eye(2)
      >>> plane_losses(lambda w: jnp.sum(w), jnp.zeros(2), w[0], w[1], [0.0, 1.0], [0.0, 2.0]).tolist()
      [[0.0, 1.0], [2.0, 3.0]]

    Reference:
      Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, NeurIPS 2018.
    """
    rows, columns = jnp.meshgrid(jnp.asarray(v), jnp.asarray(u), indexing="ij")
    weights = jnp.stack([1 - rows - columns, columns, rows], axis=-1)
    flat = jnp.reshape(weights, (-1, 3))
    losses = _losses(loss, prepare, batch_size, (origin, a, b), flat)
    return jnp.reshape(losses, (*rows.shape, *losses.shape[1:]))


def affine(models: tuple[Any, ...], weights: Any) -> Any:
    """The sum of models with weights that sum to 1; what is not floating-point is the first's."""

    def combined(*leaves: Any) -> jax.Array:
        arrays = [jnp.asarray(leaf) for leaf in leaves]
        first = arrays[0]
        if not jnp.issubdtype(first.dtype, jnp.floating):
            return first
        wide = jnp.promote_types(first.dtype, jnp.float32)
        terms = [
            jnp.asarray(weight, wide) * array.astype(wide)
            for weight, array in zip(weights, arrays, strict=True)
        ]
        return functools.reduce(jnp.add, terms).astype(first.dtype)

    return jax.tree.map(combined, *models)


@functools.partial(jax.jit, static_argnames=("loss", "prepare", "batch_size"))
def _losses(
    loss: Loss,
    prepare: Prepare | None,
    batch_size: int | None,
    models: tuple[Any, ...],
    weights: jax.Array,
) -> jax.Array:
    def one(mixed: jax.Array) -> jax.Array:
        model = affine(models, mixed)
        return jnp.asarray(loss(model if prepare is None else prepare(model)))

    found: jax.Array = jax.lax.map(one, weights, batch_size=batch_size)
    return found
