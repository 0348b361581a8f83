"""Heads split apart as the official code of MuDSC does it: for comparison only."""

from __future__ import annotations

from dataclasses import replace

from jaxmerge.align.spec import Axis, Binding, Node, PermutationSpec


def split_trees(spec: PermutationSpec) -> PermutationSpec:
    """A spec in which every set of units within a head has the head for itself: **not a symmetry**.

    The queries and keys of a head and its values are then matched with heads of their own choice, which breaks the
    function of the permuted model: `jaxmerge.align.verify` gives an error of the order of 1. It is what the official
    code does, and here to be compared with. Nodes with fixed parents only, and with one child, stay as they are.

    Args:
      spec: any.

    Returns:
      The spec with a copy of the parent per child, named ``parent/child``.

    Raises:
      ValueError: a leaf whose axis holds the parent with several of its children.

    Example:
      >>> whole = PermutationSpec.from_axes(
      ...     {"query": (None, ("head", "qk")), "value": (None, ("head", "vo"))},
      ...     sizes={"head": 2, "qk": 3, "vo": 3}, parents={"qk": ["head"], "vo": ["head"]})
      >>> [node.name for node in split_trees(whole).nodes]
      ['head/qk', 'qk', 'head/vo', 'vo']
    """
    shared = {
        node.name
        for node in spec.nodes
        if not node.fixed and len([c for c in spec.children(node.name) if not c.fixed]) > 1
    }

    def named(parent: str, child: str) -> str:
        return f"{parent}/{child}" if parent in shared else parent

    nodes: list[Node] = []
    for node in spec.nodes:
        parents = tuple(named(parent, node.name) for parent in node.parents)
        nodes += [
            replace(spec.node(parent), name=copy)
            for parent, copy in zip(node.parents, parents, strict=True)
            if copy != parent
        ]
        if node.name not in shared:
            nodes.append(replace(node, parents=parents))
    leaves = []
    for path, binding in spec.leaves:
        standing = [name for _, axis in binding.moving() for name in axis.nodes()]
        axes: list[Axis | None] = []
        for axis in binding.axes:
            if axis is None:
                axes.append(None)
                continue
            segments = []
            for segment in axis.segments:
                factors: list[str | int] = []
                for factor in segment:
                    if factor not in shared or not isinstance(factor, str):
                        factors.append(factor)
                        continue
                    near = [n for n in segment if isinstance(n, str)] + standing
                    within = dict.fromkeys(n for n in near if factor in spec.node(n).parents)
                    inside = [n for n in within if n in segment] or list(within)
                    if len(inside) > 1:
                        raise ValueError(
                            f"{path!r} holds {factor!r} with {inside}: it cannot be split"
                        )
                    first = spec.children(factor)[0].name
                    factors.append(named(factor, inside[0] if inside else first))
                segments.append(tuple(factors))
            axes.append(replace(axis, segments=tuple(segments)))
        leaves.append((path, Binding(tuple(axes))))
    return PermutationSpec(tuple(nodes), tuple(leaves))
