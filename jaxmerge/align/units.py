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


def rows(
    spec: PermutationSpec,
    chain: Chain,
    leaves: Mapping[str, Any],
    permutations: Permutations | None = None,
) -> Iterator[jax.Array]:
    """The weights that speak of a node's units, one array per place where it stands.

    The units themselves stay in the model's own order; whatever else moves is brought into the order that the
    permutations say.

    Args:
      spec: with sizes.
      chain: the node.
      leaves: the parameters by path.
      permutations: of all free nodes; None for the model's own order.

    Yields:
      [layers..., outer..., units, features], float32 or wider. Running statistics are left out.
    """
    order = (*chain.layers, *chain.outer, chain.node)
    at_rest = None if permutations is None else _around(spec, chain, permutations)
    bound = dict(spec.leaves)
    for place in chain.places:
        if place.role == "stat":
            continue
        leaf = jnp.asarray(leaves[place.path])
        leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        binding = bound[place.path]
        if permutations is not None and at_rest is not None:
            for axis in visiting_order(spec, binding):
                nodes = set(_nodes(binding.axes[axis]))
                again = axis != place.axis and chain.node in nodes
                if not again and nodes <= {*chain.layers, *chain.outer, chain.node}:
                    continue
                current = {**at_rest, chain.node: permutations[chain.node]} if again else at_rest
                index, above = indices(spec, binding, current, axis)
                leaf = gather(leaf, index, axis, above)
        yield _unit_rows(spec, place, binding.axes, leaf, order)


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
) -> jax.Array:
    """[sizes of `order`..., features] of one place."""
    own = axes[place.axis]
    assert own is not None
    lengths = [math.prod(spec.size(f) for f in segment) for segment in own.segments]
    start = sum(lengths[: place.segment])
    leaf = jax.lax.slice_in_dim(leaf, start, start + lengths[place.segment], axis=place.axis)
    shape: list[int] = []
    names: list[str | None] = []
    for i, axis in enumerate(axes):
        segment = own.segments[place.segment] if i == place.axis else None
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
            wanted = factor in order and (i == place.axis or factor != order[-1])
            names.append(factor if wanted and isinstance(factor, str) else None)
    leaf = leaf.reshape(shape)
    front = [names.index(name) for name in order]
    rest = [i for i in range(leaf.ndim) if i not in front]
    leaf = jnp.transpose(leaf, [*front, *rest])
    return leaf.reshape(*leaf.shape[: len(order)], -1)


def chain_free(segment: Sequence[str | int], parents: Sequence[str]) -> bool:
    """Whether none of the parents stands in a segment."""
    return not any(factor in parents for factor in segment)
