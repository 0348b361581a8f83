"""Applies permutations to parameters: one gather per axis that moves, from indices that the spec compiles to."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.align.spec import Axis, Binding, Node, PermutationSpec, Segment
from jaxmerge.tree import flatten, nearest, unflatten

Permutations = dict[str, jax.Array]


def permute(spec: PermutationSpec, permutations: Mapping[str, Any], params: Any) -> Any:
    r"""Permutes the units of a model.

    .. math:: W'_{i \ldots} = W_{\pi(i) \ldots}

    for every axis that the spec binds to a node with permutation :math:`\pi`: the function of the model stays the same.

    Args:
      spec: where the nodes stand.
      permutations: per node that is not fixed an integer array [sizes of the parents..., size]; ``[p.., i]`` is the
        unit that comes to place i within the parents' units at places p. Nodes that are left out stay as they are.
        They may be traced, and batched by vmap.
      params: the tree of parameters.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: an unknown node, a permutation of another shape, or parameters that do not fit the spec.

    Example:
      >>> import jax.numpy as jnp
      >>> spec = PermutationSpec.from_axes({"fc1": (None, "P0"), "fc2": ("P0", None)})
      >>> permute(spec, {"P0": [1, 0]}, {"fc1": jnp.array([[1, 2]]), "fc2": jnp.array([[3], [4]])})
      {'fc1': Array([[2, 1]], dtype=int32), 'fc2': Array([[4],
             [3]], dtype=int32)}
    """
    leaves, definition = flatten(params)
    spec = spec.sized({path: np.shape(leaf) for path, leaf in leaves.items()})
    permutations = check(spec, permutations)
    bound = dict(spec.leaves)
    moved = (
        _permuted(spec, bound[path], permutations, leaf) if path in bound else leaf
        for path, leaf in leaves.items()
    )
    return unflatten(definition, moved)


def identity(spec: PermutationSpec) -> Permutations:
    """The permutations that move nothing; the spec's nodes must have sizes.

    Example:
      >>> identity(PermutationSpec.from_axes({"w": ("P0",)}, sizes={"P0": 3}))["P0"].tolist()
      [0, 1, 2]
    """
    return {
        node.name: jnp.broadcast_to(jnp.arange(node.size, dtype=jnp.int32), spec.shape(node.name))
        for node in spec.free()
    }


def random(spec: PermutationSpec, key: jax.Array) -> Permutations:
    """A uniformly random member of the symmetry group.

    Args:
      spec: its nodes must have sizes.
      key: a JAX key.

    Example:
      >>> import jax
      >>> spec = PermutationSpec.from_axes({"w": (("head", "unit"),)}, sizes={"head": 2, "unit": 3},
      ...                                  parents={"unit": ["head"]})
      >>> {name: p.shape for name, p in random(spec, jax.random.key(0)).items()}
      {'head': (2,), 'unit': (2, 3)}
    """
    nodes = spec.free()
    found = {}
    for node, one in zip(nodes, jax.random.split(key, max(len(nodes), 1)), strict=False):
        ranks = jax.random.uniform(one, spec.shape(node.name))
        found[node.name] = jnp.argsort(ranks, axis=-1).astype(jnp.int32)
    return found


def inverse(spec: PermutationSpec, permutations: Mapping[str, Any]) -> Permutations:
    """The permutations that undo others: ``permute(inverse(p), permute(p, params))`` is `params`."""
    permutations = check(spec, permutations)
    found = {}
    for node in spec.free():
        shape = spec.shape(node.name)
        places = _places(shape)
        source = _taken(spec, node, permutations, places)
        found[node.name] = (
            jnp.zeros(shape, jnp.int32).at[source].set(jnp.broadcast_to(places[-1], shape))
        )
    return found


def compose(
    spec: PermutationSpec, first: Mapping[str, Any], second: Mapping[str, Any]
) -> Permutations:
    """The permutations that do `first` and then `second`: ``permute(second, permute(first, params))``."""
    first, second = check(spec, first), check(spec, second)
    return {
        node.name: first[node.name][_taken(spec, node, second, _places(spec.shape(node.name)))]
        for node in spec.free()
    }


def check(spec: PermutationSpec, permutations: Mapping[str, Any]) -> Permutations:
    """Permutations of all nodes that are not fixed, as int32 arrays; those left out are the identity.

    Raises:
      ValueError: an unknown or fixed node, or an array of another shape.
    """
    names = [node.name for node in spec.free()]
    unknown = [name for name in permutations if name not in names]
    if unknown:
        raise ValueError(f"no node {unknown[0]!r} is permuted{nearest(unknown[0], names)}")
    found = identity(spec)
    for name, given in permutations.items():
        array = jnp.asarray(given)
        if array.shape != spec.shape(name) or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"the permutation of {name!r}: expected integers of shape {list(spec.shape(name))}, "
                f"found {array.dtype} of shape {list(array.shape)}"
            )
        found[name] = array.astype(jnp.int32)
    return found


def indices(
    spec: PermutationSpec, binding: Binding, permutations: Permutations, axis: int
) -> tuple[jax.Array, tuple[int, ...]]:
    """Where the entries along one axis of a leaf come from.

    Args:
      spec: with sizes.
      binding: the leaf's.
      permutations: of all free nodes.
      axis: which axis.

    Returns:
      int32 [axes that it depends on..., axis], and these other axes in ascending order. The index holds once the other
      axes are permuted.
    """
    found = binding.axes[axis]
    assert found is not None
    above = other_axes(spec, binding, axis)
    where = _coordinates_on(spec, binding, above)
    columns, start = [], 0
    for segment in found.segments:
        columns.append(start + _segment_index(spec, segment, permutations, where, len(above)))
        start += _length(spec, segment)
    lengths = [max(column.shape[i] for column in columns) for i in range(len(above))]
    whole = [jnp.broadcast_to(c, (*lengths, c.shape[-1])) for c in columns]
    return jnp.concatenate(whole, axis=-1), above


def gather(leaf: jax.Array, index: jax.Array, axis: int, above: tuple[int, ...]) -> jax.Array:
    """Takes the entries along an axis by indices that may depend on other axes."""
    if not above:
        return jnp.take(leaf, index, axis=axis, mode="clip")
    order = [*above, axis]
    placed = jnp.transpose(index, sorted(range(len(order)), key=order.__getitem__))
    shape = [leaf.shape[i] if i in order else 1 for i in range(leaf.ndim)]
    return jnp.take_along_axis(leaf, jnp.reshape(placed, shape), axis=axis)


def sources(
    spec: PermutationSpec, name: str, permutations: Permutations, at: Mapping[str, jax.Array]
) -> jax.Array:
    """Which of a node's units come to the given places of it and its parents."""
    node = spec.node(name)
    if node.fixed:
        return at[name]
    return permutations[name][tuple(at[n] for n in (*node.parents, name))]


def visiting_order(spec: PermutationSpec, binding: Binding) -> list[int]:
    """The axes of a leaf that move, each after those that it depends on."""
    left = [i for i, _ in binding.moving()]
    order: list[int] = []
    while left:
        ready = [i for i in left if all(j in order for j in other_axes(spec, binding, i))]
        order += ready[:1]
        left.remove(ready[0])
    return order


def _permuted(
    spec: PermutationSpec, binding: Binding, permutations: Permutations, leaf: Any
) -> jax.Array:
    leaf = jnp.asarray(leaf)
    for axis in visiting_order(spec, binding):
        if any(not spec.node(name).fixed for name in _axis(binding, axis).nodes()):
            leaf = gather(leaf, *_index_first(indices(spec, binding, permutations, axis), axis))
    return leaf


def _index_first(
    found: tuple[jax.Array, tuple[int, ...]], axis: int
) -> tuple[jax.Array, int, tuple[int, ...]]:
    return found[0], axis, found[1]


def _axis(binding: Binding, axis: int) -> Axis:
    found = binding.axes[axis]
    assert found is not None
    return found


def other_axes(spec: PermutationSpec, binding: Binding, axis: int) -> tuple[int, ...]:
    """The axes of the leaf that hold parents of this axis's nodes, where the axis itself does not."""
    mine = _axis(binding, axis)
    outside = {
        parent
        for segment in mine.segments
        for name in segment
        if isinstance(name, str)
        for parent in spec.node(name).parents
        if parent not in segment
    }
    return tuple(i for i, other in binding.moving() if i != axis and outside & set(other.nodes()))


def _coordinates_on(
    spec: PermutationSpec, binding: Binding, axes: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """For each node on the given axes, which of its units each index belongs to, broadcast over these axes."""
    found = {}
    for place, i in enumerate(axes):
        segments = _axis(binding, i).segments
        for segment in segments[:1]:
            for factor, coordinate in zip(segment, _coordinates(spec, segment), strict=True):
                if isinstance(factor, str):
                    shape = [1] * (len(axes) + 1)
                    shape[place] = coordinate.size
                    found[factor] = coordinate.reshape(shape)
    return found


def _coordinates(spec: PermutationSpec, segment: Segment) -> tuple[np.ndarray, ...]:
    sizes = [spec.size(factor) for factor in segment]
    return np.unravel_index(np.arange(math.prod(sizes)), sizes)


def _segment_index(
    spec: PermutationSpec,
    segment: Segment,
    permutations: Permutations,
    where: Mapping[str, np.ndarray],
    above: int,
) -> jax.Array:
    inside = {
        factor: coordinate.reshape((1,) * above + (-1,))
        for factor, coordinate in zip(segment, _coordinates(spec, segment), strict=True)
        if isinstance(factor, str)
    }
    index: Any = jnp.zeros((1,) * above + (_length(spec, segment),), jnp.int32)
    stride = _length(spec, segment)
    for factor, own in zip(segment, _coordinates(spec, segment), strict=True):
        stride //= spec.size(factor)
        source: Any = own.reshape((1,) * above + (-1,)).astype(np.int32)
        if isinstance(factor, str) and not spec.node(factor).fixed:
            at = [{**where, **inside}[name] for name in (*spec.node(factor).parents, factor)]
            shape = np.broadcast_shapes(*(a.shape for a in at))
            source = permutations[factor][tuple(np.broadcast_to(a, shape) for a in at)]
        shape = np.broadcast_shapes(index.shape, source.shape)
        index = jnp.broadcast_to(index, shape) + jnp.broadcast_to(source, shape) * np.int32(stride)
    return index


def _places(shape: tuple[int, ...]) -> list[jax.Array]:
    return [jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in range(len(shape))]


def _taken(
    spec: PermutationSpec, node: Node, permutations: Permutations, places: list[jax.Array]
) -> tuple[jax.Array, ...]:
    """Where the units at the given places come from: the parents' units, then the unit within them."""
    at = dict(zip((*node.parents, node.name), places, strict=True))
    return tuple(sources(spec, name, permutations, at) for name in (*node.parents, node.name))


def _length(spec: PermutationSpec, segment: Segment) -> int:
    return functools.reduce(lambda n, factor: n * spec.size(factor), segment, 1)
