"""Merge and unmerge matrices of clusters of units, applied to parameters as the spec says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.align.spec import Axis, Binding, PermutationSpec

Matrices = Mapping[str, tuple[jax.Array, jax.Array]]


def merge_matrices(labels: Any) -> tuple[jax.Array, jax.Array]:
    r"""The matrices by which the leaves that produce units, and those that read them, go over to merged units.

    .. math:: U^m_{ik} = [\text{unit } i \text{ of model } m \text{ is part of } k], \quad
              M^m_{ik} = \frac{N\, U^m_{ik}}{\sum_{m' i'} U^{m'}_{i'k}}

    The mean over the N models of what each produces under M is then the mean of a cluster's units.

    Args:
      labels: int [..., models, n], the merged unit in [0, n) of each unit.

    Returns:
      M and U, floats [..., models, n, n], old units first.

    Example:
      >>> merge, unmerge = merge_matrices([[0, 1], [1, 0]])
      >>> unmerge[1].tolist(), merge[1].tolist()
      ([[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]])

    Reference:
      Stoica et al., ZipIt! Merging Models from Different Tasks without Training, ICLR 2024.
    """
    labels = jnp.asarray(labels)
    unmerge = jax.nn.one_hot(labels, labels.shape[-1], dtype=jnp.result_type(float))
    sizes = jnp.sum(unmerge, axis=(-3, -2), keepdims=True)
    return labels.shape[-2] * unmerge / jnp.maximum(sizes, 1), unmerge


def transformed(
    spec: PermutationSpec,
    binding: Binding,
    leaf: jax.Array,
    matrices: Matrices,
    parents: Mapping[str, tuple[str, ...]],
    own: tuple[str, int] | None = None,
) -> jax.Array:
    """One model's leaf over merged units: M on what produces them, U on what reads them.

    Args:
      spec: with sizes.
      binding: the leaf's.
      leaf: of this model, in the common order of heads and groups.
      matrices: per node M and U of this model, [parents..., n, n].
      parents: per node the names of the leading axes of its matrices.
      own: a node and an axis where it is left as it is.
    """
    for i, axis in binding.moving():
        if not set(axis.nodes()) & set(matrices):
            continue
        pieces, start = [], 0
        for segment in axis.segments:
            length = 1
            for factor in segment:
                length *= spec.size(factor)
            piece = jax.lax.slice_in_dim(leaf, start, start + length, axis=i)
            for name in segment:
                if isinstance(name, str) and name in matrices and (name, i) != own:
                    matrix = matrices[name][1 if axis.role == "in" else 0]
                    piece = _contracted(
                        spec, binding.axes, piece, i, segment, name, matrix, parents[name]
                    )
            pieces.append(piece)
            start += length
        leaf = jnp.concatenate(pieces, axis=i)
    return leaf


def _contracted(
    spec: PermutationSpec,
    axes: Sequence[Axis | None],
    leaf: jax.Array,
    where: int,
    segment: Sequence[str | int],
    name: str,
    matrix: jax.Array,
    parents: tuple[str, ...],
) -> jax.Array:
    """Contracts the axis of one factor of a leaf's axis; its parents' axes run along."""
    shape: list[int] = []
    names: list[str | None] = []
    for i, axis in enumerate(axes):
        factors: Sequence[str | int] = ()
        if i == where:
            factors = segment
        elif axis is not None and len(axis.segments) == 1 and set(axis.nodes()) & set(parents):
            factors = axis.segments[0]
        if factors:
            shape += [spec.size(factor) for factor in factors]
            names += [
                f if isinstance(f, str) and (i == where or f in parents) else None for f in factors
            ]
        else:
            shape.append(leaf.shape[i])
            names.append(None)
    whole = leaf.reshape(shape)
    letters = list(range(len(shape)))
    mine = names.index(name)
    new = len(shape)
    result = [new if i == mine else i for i in letters]
    along = [names.index(parent) for parent in parents]
    computed = jnp.promote_types(leaf.dtype, jnp.float32)
    product = jnp.einsum(
        whole.astype(computed),
        letters,
        matrix.astype(computed),
        [*along, mine, new],
        result,
        precision=jax.lax.Precision.HIGHEST,
    )
    return product.reshape(leaf.shape)
