"""How nodes hang together: which are matched together, and what of each leaf speaks of which node."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmerge.align.spec import Node, PermutationSpec, Segment


@dataclass(frozen=True)
class Place:
    """One stretch of one axis of a leaf that a node stands on.

    Attributes:
      path: the leaf.
      axis: which axis of it.
      segment: which segment of the axis.
      role: of the axis.
      nodes: the stretches of the leaf's axes that hold the node or what it is within: axis, segment, and the segment's
        factors as (name or None, size).
    """

    path: str
    axis: int
    segment: int
    role: str
    nodes: tuple[tuple[int, int, tuple[tuple[str | None, int], ...]], ...]


@dataclass(frozen=True)
class Chain:
    """A node with the nodes that it is permuted within.

    Attributes:
      node: its name.
      layers: its fixed parents, the outermost first: the node is matched in each of their units by itself.
      outer: its other parents, the outermost first: the node is matched for each pair of their units.
      places: where it stands in leaves that none of its own children stands in: what speaks of it.
    """

    node: str
    layers: tuple[str, ...]
    outer: tuple[str, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Tree:
    """A node of the outermost kind with all that is permuted within its units: matched in one go.

    Attributes:
      root: its name.
      chains: of all its nodes, the root's first, parents before children.
    """

    root: str
    chains: tuple[Chain, ...]

    def children(self, chain: Chain) -> list[Chain]:
        """The chains whose innermost outer node is this chain's."""
        return [other for other in self.chains if other.outer[-1:] == (chain.node,)]


def trees(spec: PermutationSpec) -> tuple[Tree, ...]:
    """The trees of a spec, in the order of its nodes.

    Args:
      spec: any.
    """
    found = []
    for node in spec.free():
        if any(not spec.node(parent).fixed for parent in node.parents):
            continue
        members = [node, *(other for other in spec.free() if node.name in other.parents)]
        found.append(Tree(node.name, tuple(_chain(spec, member) for member in members)))
    return tuple(found)


def _chain(spec: PermutationSpec, node: Node) -> Chain:
    inner = {child.name for child in spec.children(node.name) if not child.fixed}
    places = []
    for path, binding in spec.leaves:
        standing = {name for _, axis in binding.moving() for name in axis.nodes()}
        if standing & inner:
            continue
        for i, axis in binding.moving():
            for j, segment in enumerate(axis.segments):
                if node.name in segment:
                    nodes = [(i, j, _named(spec, segment))]
                    nodes += [
                        (k, 0, _named(spec, other.segments[0]))
                        for k, other in binding.moving()
                        if k != i and set(other.nodes()) & set(node.parents)
                    ]
                    places.append(Place(path, i, j, axis.role, tuple(nodes)))
    layers = tuple(parent for parent in node.parents if spec.node(parent).fixed)
    outer = tuple(parent for parent in node.parents if not spec.node(parent).fixed)
    return Chain(node.name, layers, outer, tuple(places))


def _named(spec: PermutationSpec, segment: Segment) -> tuple[tuple[str | None, int], ...]:
    return tuple(
        (factor if isinstance(factor, str) else None, spec.size(factor)) for factor in segment
    )
