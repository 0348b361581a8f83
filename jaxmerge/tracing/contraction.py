"""Reads a matrix product or a convolution with a parameter as inputs [n, in] times the parameter."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jaxmerge.tracing.site import Site
from jaxmerge.tracing.views import Pieces, View, in_leaf_order, sizes


@dataclass(frozen=True)
class Contraction:
    """A contraction at a site.

    Attributes:
      site: where.
      view: the operand that is the parameter.
      inputs: the other operand as [n, in].
      rows: brings the output to [n, out].
    """

    site: Site
    view: View
    inputs: jax.Array
    rows: Callable[[jax.Array], jax.Array]


def contraction(eqn: JaxprEqn, operands: Sequence[Any]) -> Contraction | None:
    """Reads an operation as a linear layer, or returns None if it is none.

    Args:
      eqn: the operation.
      operands: arrays, or `View`s of parameters.
    """
    if eqn.primitive.name not in ("dot_general", "conv_general_dilated"):
        return None
    places = [i for i, operand in enumerate(operands) if isinstance(operand, View)]
    if len(places) != 1 or not jnp.issubdtype(operands[1 - places[0]].dtype, jnp.floating):
        return None
    if eqn.primitive.name == "dot_general":
        return _product(eqn, operands, places[0])
    return _convolution(eqn, operands) if places == [1] else None


def _product(eqn: JaxprEqn, operands: Sequence[Any], place: int) -> Contraction | None:
    contracted, batched = eqn.params["dimension_numbers"]
    if batched[0]:
        return None
    view, other = operands[place], operands[1 - place]
    summed, crossed = contracted[place], contracted[1 - place]
    free = [i for i in range(len(view.dims)) if i not in summed]
    kept = [i for i in range(other.ndim) if i not in crossed]
    n = math.prod(other.shape[i] for i in kept)
    inputs = other.transpose((*kept, *crossed)).reshape((n, *(other.shape[i] for i in crossed)))

    def rows(output: jax.Array) -> jax.Array:
        first = len(free) if place == 0 else 0
        output = jnp.moveaxis(output, range(first), range(output.ndim - first, output.ndim))
        return output.reshape((n, *output.shape[len(kept) :]))

    return _read(view, [view.dims[i] for i in summed], [view.dims[i] for i in free], inputs, rows)


def _convolution(eqn: JaxprEqn, operands: Sequence[Any]) -> Contraction | None:
    image, view = operands
    params = eqn.params
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    lhs, rhs, out = params["dimension_numbers"]
    kernel = view.shape
    window = [kernel[i] for i in rhs[2:]]
    patches = jax.lax.conv_general_dilated_patches(
        image.transpose(lhs),
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,
    )
    inputs = _channels_last(patches).reshape((-1, kernel[rhs[1]], *window))

    def rows(output: jax.Array) -> jax.Array:
        return _channels_last(output.transpose(out)).reshape((-1, kernel[rhs[0]]))

    return _read(view, [view.dims[i] for i in rhs[1:]], [view.dims[rhs[0]]], inputs, rows)


def _channels_last(array: jax.Array) -> jax.Array:
    return jnp.moveaxis(array, 1, -1)


def _read(
    view: View,
    summed: Sequence[Pieces],
    free: Sequence[Pieces],
    inputs: jax.Array,
    rows: Callable[[jax.Array], jax.Array],
) -> Contraction | None:
    """A contraction whose columns follow the leaf's axes; None unless it sums over whole axes of the leaf."""
    source = view.source
    shape = source.value.shape
    inside = sizes(tuple(piece for pieces in summed for piece in pieces))
    outside = sizes(tuple(piece for pieces in free for piece in pieces))
    if not inside or any(shape[axis] != size for axis, size in inside.items()):
        return None
    if any(axis in outside for axis in inside):
        return None
    site = Site(
        source.path,
        tuple(sorted(inside)),
        tuple(axis for axis in range(len(shape)) if axis not in inside),
        tuple(shape),
        source.layers,
        all(shape[axis] == size for axis, size in outside.items()),
        source.repeated,
    )
    return Contraction(
        site,
        view,
        in_leaf_order(inputs, summed, 1),
        lambda output: in_leaf_order(rows(output), free, 1),
    )
