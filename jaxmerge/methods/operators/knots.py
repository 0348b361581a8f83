"""KnOTS: TIES in a basis that all task vectors share."""

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.methods.leaf import Chunk, Found, LeafMethod, Local, Measure, Select, Sums, Values
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators import spectra
from jaxmerge.methods.operators.task_vectors import Divisor, ties
from jaxmerge.methods.registry import register


@register
def knots(*, divisor: Divisor = "absolute") -> MergeMethod:
    r"""KnOTS-TIES: expresses the task vectors in one basis, merges the coordinates by TIES, maps back.

    .. math:: [d_1 \dots d_T] = U \Sigma [V_1 \dots V_T]^T, \quad
       \theta = \theta_0 + \lambda U \, \mathrm{TIES}(\Sigma V_1^T, \dots, \Sigma V_T^T)

    The task vectors stand side by side along the inputs, so that U spans outputs. The density is a share of the entries
    of a coordinate matrix, min(outputs, T * inputs) * inputs. Coordinates below 1e-6 of the largest singular value are
    0, so that rounding elects nothing. Tensors that are not matrices take TIES entry by entry. See `ties` for what the
    hyperparameters mean; its scope is each tensor here.

    Args:
      divisor: see `ties`.

    Returns:
      A `MergeMethod` with hyperparameters weight and density [models], scale, normalize, rescale. Needs a base.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> base, a, b = ({"w": jnp.diag(jnp.array(x))} for x in ([0.0, 0.0], [2.0, 0.0], [0.0, 3.0]))
      >>> jnp.abs(jm.merge("knots", [a, b], base=base, density=0.5)["w"]).round(2)
      Array([[2., 0.],
             [0., 3.]], dtype=float32)

    Reference:
      Stoica et al., Model merging with SVD to tie the Knots, ICLR 2025.
    """
    inner = ties(scope="tensor", divisor=divisor).leaf
    assert inner is not None
    hyperparams = dict(inner.hyperparams)
    hyperparams["density"] = replace(hyperparams["density"], share_of="basis")
    leaf = LeafMethod(
        "knots",
        functools.partial(_merge, inner),
        MappingProxyType(hyperparams),
        (Local("basis", _basis), *map(_in_basis, inner.measures)),
        sizes=_sizes,
        cuts="never",
    )
    return from_leaf(leaf, summary="TIES on coordinates in a basis that all task vectors share.")


def _sizes(shape: tuple[int, ...], inputs: tuple[int, ...], models: int) -> Mapping[str, int]:
    if not spectra.is_matrix(shape, inputs):
        return {"basis": math.prod(shape)}
    columns = shape[inputs[0]]
    return {"basis": min(shape[1 - inputs[0]], models * columns) * columns}


def _basis(chunk: Chunk) -> tuple[jax.Array, tuple[jax.Array, ...]] | None:
    """The basis [outputs, k], and each model's coordinates [k, inputs]."""
    if not spectra.has_spectrum(chunk):
        return None
    deltas = [chunk.as_matrix(delta) for delta in chunk.deltas()]
    joined = jnp.concatenate(deltas, axis=1)
    u, s, v = spectra.decompose(joined)
    coordinates = s[:, None] * v
    # Rounding has no sign to elect: what is nothing beside the largest singular value is nothing.
    real = jnp.abs(coordinates) > spectra.zero(joined) * s[0]
    return u, tuple(jnp.split(jnp.where(real, coordinates, 0.0), len(deltas), axis=1))


def _coordinates(chunk: Chunk, basis: Any) -> Chunk:
    """The chunk as TIES sees it: the coordinates as task vectors of a base of zeros."""
    if basis is None:
        return chunk
    _, models = basis
    zeros = jnp.zeros_like(models[0])
    return replace(chunk, models=models, base=zeros, size=jnp.uint32(zeros.size), inputs=(1,))


def _in_basis(one: Measure) -> Measure:
    """A measure of TIES, taken of the coordinates."""
    if isinstance(one, Select):
        magnitudes = one.values
        return one._replace(
            values=lambda chunk, basis: magnitudes(_coordinates(chunk, basis)), of="basis"
        )
    assert isinstance(one, Sums)
    statistics = one.statistics
    return one._replace(
        statistics=lambda chunk, values, found: statistics(
            _coordinates(chunk, found["basis"]), values, found
        )
    )


def _merge(inner: LeafMethod, chunk: Chunk, values: Values, found: Found) -> jax.Array:
    basis = found["basis"]
    merged = inner.apply(_coordinates(chunk, basis), values, found)
    if basis is None:
        return merged
    return chunk.with_base(chunk.from_matrix(spectra.product(basis[0], merged)))
