"""What the leaves say of each unit: rows of weights, one row per unit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.align.permuting import (
    Permutations,
    gather,
    identity,
    indices,
    inverse,
    sources,
    visiting_order,
)
from jaxmerge.align.spec import Axis, PermutationSpec
from jaxmerge.align.trees import Chain, Place

Turned = dict[tuple[str, int], jax.Array]
"""Per leaf and axis the leaf with this axis last, float32 or wider."""


def turned(chain: Chain, leaves: Mapping[str, Any]) -> Turned:
    """The leaves that speak of a node, its units last: gathers then take whole stretches.

    Args:
      chain: the node.
      leaves: the parameters by path.
    """
    found = {}
    for place in _speaking(chain):
        leaf = jnp.asarray(leaves[place.path])
        leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        found[place.path, place.axis] = jnp.moveaxis(leaf, place.axis, -1)
    return found


def rows(
    spec: PermutationSpec,
    chain: Chain,
    leaves: Turned,
    permutations: Permutations | None = None,
) -> Iterator[jax.Array]:
    """The weights that speak of a node's units, one array per place where it stands.

    The units themselves stay in the model's own order; whatever else moves is brought into the order that the
    permutations say.

    Args:
      spec: with sizes.
      chain: the node.
      leaves: what `turned` gives.
      permutations: of all free nodes; None for the model's own order.

    Yields:
      [layers..., features, outer..., units]. Running statistics are left out.
    """
    order = (*chain.layers, *chain.outer, chain.node)
    at_rest = None if permutations is None else _around(spec, chain, permutations)
    bound = dict(spec.leaves)
    for place in _speaking(chain):
        leaf = leaves[place.path, place.axis]
        binding = bound[place.path]
        turn = [*(i for i in range(leaf.ndim) if i != place.axis), place.axis]
        if permutations is not None and at_rest is not None:
            for axis in visiting_order(spec, binding):
                nodes = set(_nodes(binding.axes[axis]))
                again = axis != place.axis and chain.node in nodes
                if not again and nodes <= {*chain.layers, *chain.outer, chain.node}:
                    continue
                current = {**at_rest, chain.node: permutations[chain.node]} if again else at_rest
                index, above = indices(spec, binding, current, axis)
                leaf = gather(leaf, index, turn.index(axis), tuple(map(turn.index, above)))
        axes = [binding.axes[i] for i in turn]
        yield _unit_rows(spec, place, axes, leaf, order, len(chain.layers))


def _speaking(chain: Chain) -> list[Place]:
    return [place for place in chain.places if place.role != "stat"]


def _around(spec: PermutationSpec, chain: Chain, permutations: Permutations) -> Permutations:
    """Permutations of everything but a node and those that it is within.

    What is permuted within these goes on by their own units, not by those that take their place.
    """
    still = {*chain.outer, chain.node}
    resting = identity(spec)
    back = inverse(spec, permutations)
    found = {}
    for node in spec.free():
        if node.name in still:
            found[node.name] = resting[node.name]
        elif still & set(node.parents):
            shape = spec.shape(node.name)
            places = [jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in range(len(shape))]
            at = dict(zip((*node.parents, node.name), places, strict=True))
            aligned = [
                sources(spec, parent, back, at) if parent in still else at[parent]
                for parent in node.parents
            ]
            found[node.name] = permutations[node.name][(*aligned, at[node.name])]
        else:
            found[node.name] = permutations[node.name]
    return found


def _nodes(axis: Axis | None) -> list[str]:
    return [] if axis is None else axis.nodes()


def _unit_rows(
    spec: PermutationSpec,
    place: Place,
    axes: Sequence[Axis | None],
    leaf: jax.Array,
    order: tuple[str, ...],
    count: int,
) -> jax.Array:
    """[layers..., features, the other sizes of `order`...] of one place, whose own axis is the last of `axes`."""
    own, last = axes[-1], len(axes) - 1
    assert own is not None
    lengths = [math.prod(spec.size(f) for f in segment) for segment in own.segments]
    start = sum(lengths[: place.segment])
    leaf = jax.lax.slice_in_dim(leaf, start, start + lengths[place.segment], axis=last)
    shape: list[int] = []
    names: list[str | None] = []
    for i, axis in enumerate(axes):
        segment = own.segments[place.segment] if i == last else None
        if segment is None and axis is not None and len(axis.segments) == 1:
            segment = axis.segments[0]
            if chain_free(segment, order[:-1]):
                segment = None
        if segment is None:
            shape.append(leaf.shape[i])
            names.append(None)
            continue
        for factor in segment:
            shape.append(spec.size(factor))
            wanted = factor in order and (i == last or factor != order[-1])
            names.append(factor if wanted and isinstance(factor, str) else None)
    leaf = leaf.reshape(shape)
    layers, units = (
        [names.index(name) for name in part] for part in (order[:count], order[count:])
    )
    rest = [i for i in range(leaf.ndim) if i not in (*layers, *units)]
    leaf = jnp.transpose(leaf, [*layers, *rest, *units])
    sizes = [spec.size(name) for name in order]
    return leaf.reshape(*sizes[:count], -1, *sizes[count:])


def chain_free(segment: Sequence[str | int], parents: Sequence[str]) -> bool:
    """Whether none of the parents stands in a segment."""
    return not any(factor in parents for factor in segment)
