"""The permutation symmetry of a model as plain data: nodes that may be permuted, and where they stand in the leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxmerge.tree import matches, nearest

Role = Literal["out", "in", "both", "norm", "stat"]
# A factor of an axis: the name of a node, or the size of what does not move.
Factor = str | int
Segment = tuple[Factor, ...]


@dataclass(frozen=True)
class Node:
    """A set of units that may be permuted.

    Attributes:
      name: unique in its spec.
      size: how many units; None in a spec written by hand until it meets parameters (`sized`).
      parents: nodes within whose units these are permuted separately (a wreath product): the channels of each group,
        the value dimensions of each head, the hidden units of each layer of a stack. The first is the outermost.
      fixed: its units do not move; it is a node because others depend on which of its units they belong to.
    """

    name: str
    size: int | None
    parents: tuple[str, ...] = ()
    fixed: bool = False


@dataclass(frozen=True)
class Axis:
    """What one axis of a leaf consists of.

    Attributes:
      segments: the axis is their concatenation; each is a row-major product of factors, the slowest first.
      role: "out" for units that the leaf produces, "in" for those that it reads, "both" for an embedding that is the
        output's kernel too, "norm" for a leaf with one value per unit (biases, scales), "stat" for running statistics.
    """

    segments: tuple[Segment, ...]
    role: Role

    def nodes(self) -> list[str]:
        """The names of the nodes in this axis, in order."""
        return [
            factor for segment in self.segments for factor in segment if isinstance(factor, str)
        ]


@dataclass(frozen=True)
class Binding:
    """Where nodes stand in one leaf: per axis what it consists of, None where it does not move."""

    axes: tuple[Axis | None, ...]

    def moving(self) -> Iterator[tuple[int, Axis]]:
        """The axes that consist of nodes."""
        return ((i, axis) for i, axis in enumerate(self.axes) if axis is not None)


@dataclass(frozen=True)
class PermutationSpec:
    """The permutations of a model's units that leave its function unchanged.

    A permutation of the whole model (`jaxmerge.align.Permutations`) maps each node that is not fixed to an int32 array
    [sizes of the parents..., size]: the unit that comes to each place. A spec is data, hashable and comparable, and of
    one type whether `jaxmerge.align.symmetry` derived it or somebody wrote it.

    Attributes:
      nodes: parents before those that depend on them.
      leaves: the leaves that hold nodes, by path, in the tree's order.

    Example:
      >>> spec = PermutationSpec.from_axes({"fc1/kernel": (None, "P0"), "fc2/kernel": ("P0", None)})
      >>> [node.name for node in spec.nodes], spec.binding("fc2/kernel").axes[0].role
      (['P0'], 'in')
    """

    nodes: tuple[Node, ...]
    leaves: tuple[tuple[str, Binding], ...]

    def node(self, name: str) -> Node:
        """The node of this name.

        Raises:
          KeyError: there is none; the message has the nearest.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        names = [node.name for node in self.nodes]
        raise KeyError(f"no node {name!r}{nearest(name, names)}; there are {names}")

    def binding(self, path: str) -> Binding:
        """Where nodes stand in a leaf; a leaf that holds none has no binding (KeyError)."""
        for name, binding in self.leaves:
            if name == path:
                return binding
        raise KeyError(
            f"no node stands in {path!r}{nearest(path, [name for name, _ in self.leaves])}"
        )

    def free(self) -> tuple[Node, ...]:
        """The nodes that are permuted."""
        return tuple(node for node in self.nodes if not node.fixed)

    def size(self, factor: Factor) -> int:
        """How many units a node has, or what a factor that does not move counts."""
        size = self.node(factor).size if isinstance(factor, str) else factor
        if size is None:
            raise ValueError(f"node {factor!r} has no size yet: give the spec parameters first")
        return size

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a node's permutation: its parents' sizes, then its own."""
        return tuple(map(self.size, (*self.node(name).parents, name)))

    def children(self, name: str) -> tuple[Node, ...]:
        """The nodes that are permuted separately within each unit of this one."""
        return tuple(node for node in self.nodes if name in node.parents)

    def uses(self, name: str) -> list[tuple[str, int, Axis]]:
        """Where a node stands: paths, axes, and what these consist of."""
        return [
            (path, i, axis)
            for path, binding in self.leaves
            for i, axis in binding.moving()
            if name in axis.nodes()
        ]

    @classmethod
    def from_axes(
        cls,
        axes: Mapping[str, Sequence[str | Segment | list[Segment] | None]],
        *,
        sizes: Mapping[str, int] | None = None,
        parents: Mapping[str, Sequence[str]] | None = None,
        roles: Mapping[str, Sequence[Role | None]] | None = None,
    ) -> PermutationSpec:
        """Writes a spec by hand.

        Args:
          axes: per leaf, what each of its axes consists of: a node's name, a tuple of names and sizes (a row-major
            product), a list of such tuples (a concatenation), or None where nothing moves.
          sizes: sizes of nodes. Those that are not given are read off the first parameters that the spec meets.
          parents: for nodes within others, the others, the outermost first.
          roles: per leaf, the role of each axis. By default the last axis that moves of a leaf of two axes or more is
            "out" if it is the leaf's last axis, all others "in" (a kernel is [..., inputs, outputs]); the one axis of
            other leaves is "norm", or "stat" where the path says that it is a running statistic.

        Raises:
          ValueError: a parent that is no node, or nodes within each other.

        Example:
          >>> heads = PermutationSpec.from_axes(
          ...     {"value/kernel": (None, ("head", "value")), "out/kernel": (("head", "value"), None)},
          ...     sizes={"head": 2, "value": 3}, parents={"value": ["head"]})
          >>> heads.shape("value")
          (2, 3)
        """
        sizes, parents, roles = sizes or {}, parents or {}, roles or {}
        leaves = tuple(
            (path, Binding(tuple(_axes_by_hand(path, given, roles.get(path)))))
            for path, given in axes.items()
        )
        named = [n for _, binding in leaves for _, axis in binding.moving() for n in axis.nodes()]
        for name, others in parents.items():
            for other in (name, *others):
                if other not in named:
                    raise ValueError(f"{other!r} is no node of the axes{nearest(other, named)}")
        order = _outermost_first(dict.fromkeys(named), parents)
        nodes = tuple(Node(n, sizes.get(n), tuple(parents.get(n, ()))) for n in order)
        return cls(nodes, leaves)

    def sized(self, shapes: Mapping[str, Sequence[int]]) -> PermutationSpec:
        """The spec with every node's size, checked against the shapes of a model's leaves.

        Args:
          shapes: by path.

        Raises:
          ValueError: a leaf of the spec is missing, has another number of axes, or an axis has another size; the
            message names the leaf, what was expected and what was found.
        """
        sizes = {node.name: node.size for node in self.nodes}
        for path, binding in self.leaves:
            if path not in shapes:
                raise ValueError(
                    f"the spec speaks of {path!r}, which the model lacks{nearest(path, shapes)}"
                )
            if len(shapes[path]) != len(binding.axes):
                raise ValueError(
                    f"{path!r} has {len(binding.axes)} axes in the spec, {len(shapes[path])} in the model"
                )
            for i, axis in binding.moving():
                nodes = set(axis.nodes())
                unknown = [name for name in nodes if sizes[name] is None]
                if len(unknown) == 1 and len(axis.segments) == 1:
                    rest = math.prod(
                        (sizes[f] or 1) if isinstance(f, str) else f for f in axis.segments[0]
                    )
                    sizes[unknown[0]] = shapes[path][i] // rest
        for path, binding in self.leaves:
            for i, axis in binding.moving():
                missing = [name for name in axis.nodes() if sizes[name] is None]
                if missing:
                    raise ValueError(
                        f"the size of node {missing[0]!r} does not follow from the model"
                    )
                expected = axis_size(axis, sizes)
                if expected != shapes[path][i]:
                    raise ValueError(
                        f"axis {i} of {path!r} has {expected} indices in the spec, "
                        f"{shapes[path][i]} in the model"
                    )
        return replace(
            self, nodes=tuple(replace(node, size=sizes[node.name]) for node in self.nodes)
        )


def axis_size(axis: Axis, sizes: Mapping[str, int | None]) -> int:
    """How many indices an axis has."""
    return sum(
        math.prod((sizes[f] or 0) if isinstance(f, str) else f for f in segment)
        for segment in axis.segments
    )


STATISTICS = ("**batch_stats/**", "**running_mean", "**running_var")
"""Patterns of the leaves that are running statistics."""


def _axes_by_hand(
    path: str, given: Sequence[Any], roles: Sequence[Role | None] | None
) -> Iterator[Axis | None]:
    last = len(given) - 1
    for i, one in enumerate(given):
        if one is None:
            yield None
            continue
        segments = (
            ((one,),) if isinstance(one, str) else (one,) if isinstance(one, tuple) else tuple(one)
        )
        role: Role | None = None if roles is None else roles[i]
        if role is None and any(matches(path, pattern) for pattern in STATISTICS):
            role = "stat"
        elif role is None:
            role = "norm" if last == 0 else "out" if i == last else "in"
        yield Axis(tuple(map(tuple, segments)), role)


def _outermost_first(names: Iterable[str], parents: Mapping[str, Sequence[str]]) -> list[str]:
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise ValueError(f"node {name!r} is within itself: {' < '.join((*above, name))}")
        for parent in parents.get(name, ()):
            visit(parent, (*above, name))
        if name not in order:
            order.append(name)

    for name in names:
        visit(name, ())
    return order
