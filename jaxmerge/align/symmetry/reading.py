"""Reads a spec off the labels of the parameter leaves, once the whole program was walked through."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from jaxmerge.align.spec import (
    STATISTICS,
    Axis,
    Binding,
    Factor,
    Node,
    PermutationSpec,
    Role,
)
from jaxmerge.align.symmetry.atoms import (
    Atom,
    Label,
    Segment,
    dependence,
    fix,
    flat,
    proper,
)
from jaxmerge.align.symmetry.values import Uses
from jaxmerge.tree import matches

Leaves = dict[str, list[list[Segment] | None]]


def read_spec(labels: Mapping[str, Sequence[Label]], uses: Uses) -> PermutationSpec:
    """The spec that the labels say.

    Args:
      labels: per leaf and axis.
      uses: how the program uses the leaves.
    """
    leaves: Leaves = {}
    for path, axes in labels.items():
        if path not in uses.seen:
            # What the program never reads could be permuted at will, to no end.
            continue
        leaves[path] = [None if label is None else flat(label) for label in axes]
    _fix_what_is_not_read(leaves, uses)
    _fix_what_cannot_be_said(leaves)
    within = _parents(leaves)
    moving = _moving(leaves, within)
    names = _names(leaves, uses, moving)
    order = sorted(moving, key=lambda atom: (_depth(atom, within), moving.index(atom)))
    nodes = tuple(
        Node(names[a], a.size, tuple(names[p] for p in within.get(a, ())), a.fixed) for a in order
    )
    bindings = []
    for path, axes in leaves.items():
        found = tuple(_axis(path, i, axes, names, uses) for i in range(len(axes)))
        if any(axis is not None for axis in found):
            bindings.append((path, Binding(found)))
    return PermutationSpec(nodes, tuple(bindings))


def _fix_what_is_not_read(leaves: Leaves, uses: Uses) -> None:
    """Rows that a program leaves out (the positions beyond its inputs) say nothing of any order."""
    for path, axes in leaves.items():
        read = {a for atom in uses.read.get(path, ()) for a in proper(atom)}
        for label in axes:
            for segment in label or []:
                if not any(a in read for atom in segment for a in proper(atom)):
                    fix([segment])


def _fix_what_cannot_be_said(leaves: Leaves) -> None:
    """A concatenation that is a factor of a product is no axis of the spec."""
    for axes in leaves.values():
        for label in axes:
            for segment in label or []:
                if any(atom.kind is not None for atom in segment):
                    fix([segment])


def _parents(leaves: Leaves) -> dict[Atom, list[Atom]]:
    """Per free atom, the atoms within whose units it is permuted separately, the outermost first.

    An atom may depend on another only where every leaf that holds the one holds the other: earlier in the same product,
    or on an axis that it has to itself.
    """
    free = _atoms(leaves, fixed=False)
    within = {atom: dependence(atom) for atom in free}
    places: dict[Atom, list[tuple[str, int, Segment]]] = {atom: [] for atom in free}
    for path, axes in leaves.items():
        for i, label in enumerate(axes):
            for segment in label or []:
                for atom in segment:
                    if atom in places:
                        places[atom].append((path, i, segment))
    for atom, others in within.items():
        for path, i, segment in places[atom]:
            near = set(segment[: segment.index(atom)])
            for j, label in enumerate(leaves[path]):
                if j != i and label is not None and len(label) == 1:
                    near |= set(label[0])
            others[:] = [other for other in others if other in near]
    _break_circles(within)
    changed = True
    while changed:
        changed = False
        for atom, others in within.items():
            # Whatever a parent depends on, its children do too; else they depend on less.
            whole = [o for o in others if all(above in others for above in within.get(o, ()))]
            if whole != others:
                within[atom], changed = whole, True
    for others in within.values():
        others.sort(key=lambda other: (_depth(other, within), other.number))
    return {atom: others for atom, others in within.items() if others}


def _break_circles(within: dict[Atom, list[Atom]]) -> None:
    """Of two atoms that might each depend on the other, the later one does."""
    for atom, others in within.items():
        others[:] = [
            other
            for other in others
            if not (atom in within.get(other, ()) and atom.number < other.number)
        ]
    done: set[Atom] = set()

    def visit(atom: Atom, above: tuple[Atom, ...]) -> None:
        within[atom][:] = [
            other for other in within[atom] if other not in above and other is not atom
        ]
        for other in within[atom]:
            if other in within and other not in done:
                visit(other, (*above, atom))
        done.add(atom)

    for atom in within:
        visit(atom, ())


def _depth(atom: Atom, within: Mapping[Atom, Sequence[Atom]]) -> int:
    return 1 + max((_depth(other, within) for other in within.get(atom, ())), default=-1)


def _moving(leaves: Leaves, within: Mapping[Atom, Sequence[Atom]]) -> list[Atom]:
    """The atoms that become nodes: free ones, and fixed ones that others depend on."""
    needed = {other for others in within.values() for other in others}
    free = _atoms(leaves, fixed=False)
    fixed = [atom for atom in _atoms(leaves, fixed=True) if atom in needed]
    return [*fixed, *free]


def _atoms(leaves: Leaves, *, fixed: bool) -> list[Atom]:
    found: dict[Atom, None] = {}
    for axes in leaves.values():
        for label in axes:
            for segment in label or []:
                for atom in segment:
                    found |= dict.fromkeys(
                        a for a in proper(atom) if a.fixed == fixed and a.size > 1
                    )
    return list(found)


def _names(leaves: Leaves, uses: Uses, moving: Sequence[Atom]) -> dict[Atom, str]:
    """Each node is called after the layer that makes its units."""
    names: dict[Atom, str] = {}
    taken: set[str] = set()
    for wanted in ("out", "any"):
        for path, axes in leaves.items():
            for i, label in enumerate(axes):
                contracted = uses.contracts(path, i) and path not in uses.looked_up
                for segment in label or []:
                    for atom in segment:
                        if atom not in moving or atom in names:
                            continue
                        if wanted == "out" and (contracted or len(axes) == 1):
                            continue
                        base = _layer(path)
                        if len(segment) > 1:
                            base = f"{base}:{segment.index(atom)}"
                        if atom.fixed:
                            base = f"{base}:axis{i}"
                        name, n = base, 2
                        while name in taken:
                            name, n = f"{base}#{n}", n + 1
                        taken.add(name)
                        names[atom] = name
    return names


def _layer(path: str) -> str:
    """A path without the collection it starts with and the kind of parameter it ends in."""
    parts = re.split(r"[/.]", path)
    if len(parts) > 1 and parts[0] in ("params", "batch_stats"):
        parts = parts[1:]
    kinds = ("kernel", "weight", "bias", "scale", "embedding", "mean", "var", "w", "b")
    if len(parts) > 1 and parts[-1] in kinds:
        parts = parts[:-1]
    return "/".join(parts)


def _axis(
    path: str,
    i: int,
    axes: Sequence[list[Segment] | None],
    names: Mapping[Atom, str],
    uses: Uses,
) -> Axis | None:
    label = axes[i]
    if label is None or not any(atom in names for segment in label for atom in segment):
        return None
    role: Role
    if any(matches(path, pattern) for pattern in STATISTICS):
        role = "stat"
    elif uses.contracts(path, i):
        role = "both" if path in uses.looked_up else "in"
    else:
        role = "norm" if _one_value_per_unit(axes, names) else "out"
    return Axis(tuple(_segment(segment, names) for segment in label), role)


def _one_value_per_unit(axes: Sequence[list[Segment] | None], names: Mapping[Atom, str]) -> bool:
    """Whether a leaf (a layer of it) has one axis."""
    layers = [
        label
        for label in axes
        if label is not None and len(label) == 1 and all(a.fixed and a in names for a in label[0])
    ]
    return len(axes) - len(layers) == 1


def _segment(segment: Segment, names: Mapping[Atom, str]) -> tuple[Factor, ...]:
    factors: list[Factor] = []
    for atom in segment:
        if atom in names:
            factors.append(names[atom])
        elif factors and isinstance(factors[-1], int):
            factors[-1] *= atom.size
        else:
            factors.append(atom.size)
    return tuple(factors)
