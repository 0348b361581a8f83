"""Views: values that are one parameter leaf but for layout and casts."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

# A piece of a leaf's axis: (axis, how many indices, how many elements of the axis one step moves by).
Piece = tuple[int, int, int]
# The pieces that an axis of a view runs over, the slowest first.
Pieces = tuple[Piece, ...]
Step = Callable[[jax.Array], jax.Array]


@dataclass(eq=False)
class Source:
    """A parameter leaf, or one layer of it, while the program runs.

    Attributes:
      path: the leaf's path.
      value: the array, in the leaf's own layout; visitors may replace it.
      layers: how many layers the leaf holds if this is one of them, else None.
      layer: which one.
      repeated: whether a replacement lasts for one turn of a loop only.
      replaced: whether it was replaced.
      parts: the single layers that the program took, by index.
    """

    path: str
    value: jax.Array
    layers: int | None = None
    layer: int | jax.Array | None = None
    repeated: bool = False
    replaced: bool = False
    parts: dict[int, "Source"] = field(default_factory=dict)

    def replace(self, value: jax.Array) -> None:
        """Makes `value` what every later use sees."""
        self.value = jnp.asarray(value).astype(self.value.dtype).reshape(self.value.shape)
        self.replaced = True
        self.parts = {}

    def current(self) -> jax.Array:
        """The array with the layers that were replaced one by one."""
        value = self.value
        for i, part in self.parts.items():
            if part.replaced:
                value = value.at[i].set(part.value)
        return value


@dataclass(frozen=True)
class View:
    """A source after layout and cast operations.

    Attributes:
      source: what it is a view of.
      dims: per axis, the pieces of the source's axes that it runs over.
      steps: the operations that make it from the source's value.
      plain: whether these are casts only, so that they apply to one layer as they do to all.
    """

    source: Source
    dims: tuple[Pieces, ...]
    steps: tuple[Step, ...] = ()
    plain: bool = True

    @classmethod
    def of(cls, source: Source) -> "View":
        return cls(source, whole(source.value.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(size for _, size, _ in pieces) for pieces in self.dims)

    def value(self) -> jax.Array:
        value = self.source.current()
        for step in self.steps:
            value = step(value)
        return value


def whole(shape: Sequence[int]) -> tuple[Pieces, ...]:
    """The pieces of an untouched array."""
    return tuple(((axis, size, 1),) for axis, size in enumerate(shape))


def sizes(pieces: Pieces) -> dict[int, int]:
    """How many indices of each axis the pieces cover together."""
    found: dict[int, int] = {}
    for axis, size, _ in pieces:
        found[axis] = found.get(axis, 1) * size
    return found


def in_leaf_order(array: jax.Array, dims: Sequence[Pieces], leading: int) -> jax.Array:
    """Flattens the axes after the first `leading` ones into one, in the order of the leaf's axes.

    Args:
      array: its axes after the first `leading` ones are those of `dims`.
      dims: the pieces of each.
      leading: how many axes stay as they are.
    """
    pieces = [piece for dim in dims for piece in dim]
    order = sorted(range(len(pieces)), key=lambda i: (pieces[i][0], -pieces[i][2]))
    kept = array.shape[:leading]
    array = array.reshape(kept + tuple(size for _, size, _ in pieces))
    array = array.transpose((*range(leading), *(leading + i for i in order)))
    return array.reshape((*kept, math.prod(size for _, size, _ in pieces)))


def laid_out(
    eqn: JaxprEqn, view: View, others: Sequence[Any], evaluate: Callable[[jax.Array], list[Any]]
) -> list[View] | None:
    """The views that an operation makes of a view, or None if it is no layout operation.

    Args:
      eqn: an operation whose first operand is the view.
      view: that operand.
      others: the values of the other operands.
      evaluate: does the operation for another value of the first operand.
    """
    name = eqn.primitive.name
    layer = _layer(eqn, view, others)
    if layer is not None:
        return [layer]
    if name == "split":
        return _split(eqn, view, evaluate)
    if name in _CASTS and len(eqn.invars) == 1:
        if not jnp.issubdtype(eqn.params.get("new_dtype", jnp.float32), jnp.floating):
            return None
        dims: tuple[Pieces, ...] | None = view.dims
    elif name in _LAYOUTS and len(eqn.invars) == 1:
        dims = _LAYOUTS[name](view.dims, view.shape, eqn.params)
    else:
        return None
    if dims is None:
        return None
    step: Step = functools.partial(_output, evaluate, 0)
    return [View(view.source, dims, (*view.steps, step), view.plain and name in _CASTS)]


def _output(evaluate: Callable[[jax.Array], list[Any]], i: int, value: jax.Array) -> jax.Array:
    return evaluate(value)[i]


def _transpose(
    dims: tuple[Pieces, ...], shape: tuple[int, ...], params: dict[str, Any]
) -> tuple[Pieces, ...]:
    return tuple(dims[i] for i in params["permutation"])


def _squeeze(
    dims: tuple[Pieces, ...], shape: tuple[int, ...], params: dict[str, Any]
) -> tuple[Pieces, ...]:
    return tuple(pieces for i, pieces in enumerate(dims) if i not in params["dimensions"])


def _broadcast(
    dims: tuple[Pieces, ...], shape: tuple[int, ...], params: dict[str, Any]
) -> tuple[Pieces, ...] | None:
    target, places = params["shape"], params["broadcast_dimensions"]
    if math.prod(target) != math.prod(shape):
        return None
    return tuple(dims[places.index(i)] if i in places else () for i in range(len(target)))


def _reshape(
    dims: tuple[Pieces, ...], shape: tuple[int, ...], params: dict[str, Any]
) -> tuple[Pieces, ...] | None:
    target = params["new_sizes"]
    if params.get("dimensions") is not None or 0 in target:
        return None
    left = [piece for dim in dims for piece in dim if piece[1] > 1]
    regrouped = []
    for size in target:
        group = []
        while size > 1:
            axis, count, stride = left.pop(0)
            if size % count == 0:
                group.append((axis, count, stride))
                size //= count
            elif count % size == 0:
                rest = count // size
                group.append((axis, size, stride * rest))
                left.insert(0, (axis, rest, stride))
                size = 1
            else:
                return None
        regrouped.append(tuple(group))
    return tuple(regrouped)


def _slice(
    dims: tuple[Pieces, ...], shape: tuple[int, ...], params: dict[str, Any]
) -> tuple[Pieces, ...] | None:
    if params["strides"] is not None and set(params["strides"]) != {1}:
        return None
    starts, limits = params["start_indices"], params["limit_indices"]
    counts = [limit - start for start, limit in zip(starts, limits, strict=True)]
    return _narrowed(dims, shape, counts)


def _narrowed(
    dims: tuple[Pieces, ...], shape: tuple[int, ...], counts: Sequence[int]
) -> tuple[Pieces, ...] | None:
    narrowed = []
    for pieces, size, count in zip(dims, shape, counts, strict=True):
        if count == size:
            narrowed.append(pieces)
        elif len(pieces) == 1 and pieces[0][2] == 1:
            narrowed.append(((pieces[0][0], count, 1),))
        else:
            return None
    return tuple(narrowed)


_CASTS = {
    "convert_element_type",
    "copy",
    "copy_p",
    "optimization_barrier",
    "reduce_precision",
    "stop_gradient",
}
_LAYOUTS: dict[str, Callable[..., tuple[Pieces, ...] | None]] = {
    "broadcast_in_dim": _broadcast,
    "mesh_cast": lambda dims, shape, params: dims,
    "reshape": _reshape,
    "reshard": lambda dims, shape, params: dims,
    "sharding_constraint": lambda dims, shape, params: dims,
    "slice": _slice,
    "squeeze": _squeeze,
    "transpose": _transpose,
}


def _layer(eqn: JaxprEqn, view: View, others: Sequence[Any]) -> View | None:
    """One layer of a stacked leaf, taken by index."""
    shape = view.shape
    if not (view.plain and view.source.layer is None and len(shape) > 1 and shape[0] > 1):
        return None
    index: int | jax.Array
    if eqn.primitive.name == "slice" and eqn.params["strides"] is None:
        start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
        taken, index = tuple(b - a for a, b in zip(start, limit, strict=True)), start[0]
    elif eqn.primitive.name == "dynamic_slice":
        first = eqn.invars[1]
        index = int(first.val) if isinstance(first, Literal) else jnp.asarray(others[0])
        taken = tuple(eqn.params["slice_sizes"])
    else:
        return None
    if taken != (1, *shape[1:]):
        return None
    source = view.source
    if isinstance(index, int):
        index = min(max(index, 0), shape[0] - 1)
        if index not in source.parts:
            source.parts[index] = Source(
                source.path, source.value[index], shape[0], index, source.repeated, source.replaced
            )
        part = source.parts[index]
    else:
        index = jnp.clip(index, 0, shape[0] - 1)
        value = jax.lax.dynamic_index_in_dim(source.current(), index, keepdims=False)
        part = Source(source.path, value, shape[0], index, True, source.replaced)
    steps = (*view.steps, lambda value: jnp.expand_dims(value, 0))
    return View(part, ((), *whole(shape[1:])), steps, plain=False)


def _split(
    eqn: JaxprEqn, view: View, evaluate: Callable[[jax.Array], list[Any]]
) -> list[View] | None:
    shape, axis = view.shape, eqn.params["axis"]
    views = []
    for i, count in enumerate(eqn.params["sizes"]):
        dims = _narrowed(view.dims, shape, (*shape[:axis], count, *shape[axis + 1 :]))
        if dims is None:
            return None
        take: Step = functools.partial(_output, evaluate, i)
        views.append(View(view.source, dims, (*view.steps, take), plain=False))
    return views
