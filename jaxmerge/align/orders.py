"""Permutations of a model's units as the order of the entries in its checkpoint's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmerge.align.permuting import Permutations, check, indices, other_axes
from jaxmerge.align.spec import Binding, PermutationSpec
from jaxmerge.tree import Layout, TensorLayout

Order = tuple[np.ndarray | None, ...]
"""Per axis of a tensor int32 [size], the entry that comes to each place; None where the axis stays as it is."""


def tensor_orders(
    spec: PermutationSpec,
    permutations: Mapping[str, object],
    layout: Layout,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Order]:
    """What permuting a model's units does to the tensors of its checkpoint.

    Taking ``tensor[index]`` along every axis of every tensor gives the checkpoint of the permuted model.

    Args:
      spec: where the units stand, with sizes.
      permutations: as for `jaxmerge.align.permute`.
      layout: which tensor each leaf is; no leaf holds several.
      shapes: of the leaves, by path.

    Returns:
      By a tensor's name, for those in which something moves.

    Raises:
      ValueError: permutations that do not fit the spec, or a tensor in which what moves along one axis depends on the
        place along another.

    Example:
      >>> from jaxmerge.tree import TensorLayout
      >>> spec = PermutationSpec.from_axes({"fc1": (None, "P0"), "fc2": ("P0", None)}, sizes={"P0": 3})
      >>> layout = Layout({"fc1": TensorLayout(("fc1.weight",), axes=(1, 0))})
      >>> orders = tensor_orders(spec, {"P0": [2, 0, 1]}, layout, {"fc1": (4, 3), "fc2": (3, 2)})
      >>> [index if index is None else index.tolist() for index in orders["fc1.weight"]]
      [[2, 0, 1], None]
    """
    check_apart(spec, layout, shapes)
    checked = check(spec, permutations)
    orders = {}
    for path, binding in spec.leaves:
        (name,) = layout.of(path).names
        order = _of_leaf(spec, binding, checked, layout.of(path), tuple(shapes[path]))
        if any(index is not None for index in order):
            orders[name] = order
    return orders


def check_apart(spec: PermutationSpec, layout: Layout, shapes: Mapping[str, Sequence[int]]) -> None:
    """Checks that what moves along one axis of a checkpoint's tensor does so at every place along the others.

    Raises:
      ValueError: it does not.
    """
    for path, binding in spec.leaves:
        holder = _holders(layout.of(path), tuple(shapes[path]))
        for axis, _ in binding.moving():
            above = other_axes(spec, binding, axis)
            if holder[axis] is None or any(holder[other] != holder[axis] for other in above):
                raise ValueError(
                    f"{path!r}: the order along one axis of {layout.of(path).names[0]!r} depends on "
                    "another axis"
                )


def _of_leaf(
    spec: PermutationSpec,
    binding: Binding,
    permutations: Permutations,
    layout: TensorLayout,
    shape: tuple[int, ...],
) -> Order:
    stored = layout.checkpoint_shape(shape)
    turned = _turned(layout, shape)
    holder = _holders(layout, shape)
    sources: dict[int, tuple[np.ndarray, tuple[int, ...]]] = {}
    for axis, _ in binding.moving():
        index, above = indices(spec, binding, permutations, axis)
        sources[axis] = np.asarray(index), above
    order: list[np.ndarray | None] = []
    for place, size in enumerate(stored):
        inside = [axis for axis in sources if holder[axis] == place]
        steps = np.arange(size) * math.prod(stored[place + 1 :])
        lengths = [shape[axis] for axis in turned]
        at = dict(zip(turned, np.unravel_index(steps, lengths), strict=True))
        moved = dict(at)
        for axis in inside:
            taken, above = sources[axis]
            moved[axis] = taken[(*(at[other] for other in above), at[axis])]
        flat = np.ravel_multi_index([moved[axis] for axis in turned], lengths)
        found = np.asarray(flat // math.prod(stored[place + 1 :]), np.int32)
        order.append(None if np.array_equal(found, np.arange(size)) else found)
    return tuple(order)


def _turned(layout: TensorLayout, shape: Sequence[int]) -> tuple[int, ...]:
    """The leaf's axes in the tensor's order."""
    return tuple(range(len(shape))) if layout.axes is None else layout.axes


def _holders(layout: TensorLayout, shape: tuple[int, ...]) -> dict[int, int | None]:
    """For each axis of a leaf the axis of its tensor that it lies within; None where it is spread over several."""
    turned, stored = _turned(layout, shape), layout.checkpoint_shape(shape)
    lengths = [shape[axis] for axis in turned]
    spans = [_span(stored, place) for place in range(len(stored))]
    found: dict[int, int | None] = {}
    for place, axis in enumerate(turned):
        inner, outer = _span(lengths, place)
        within = (i for i, (low, high) in enumerate(spans) if low <= inner and outer <= high)
        found[axis] = next(within, None)
    return found


def _span(shape: Sequence[int], axis: int) -> tuple[int, int]:
    """How many elements lie between neighbours along an axis, and how many the axis spans."""
    inner = math.prod(shape[axis + 1 :])
    return inner, inner * shape[axis]
