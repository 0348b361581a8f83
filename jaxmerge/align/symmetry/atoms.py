"""Atoms: the indivisible axes of a program's values, unified as the program ties them to each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal

_COUNTER = itertools.count()


class Atom:
    """An axis, or a factor or a part of one, along which a program may be relabelled.

    Atoms that the program ties together become one (a union-find). An atom may turn out to be the row-major product of
    others (a reshape) or their concatenation (a slice); it then stands for them.

    Attributes:
      size: how many indices.
      fixed: no relabelling: the program tells the indices apart.
      kind: what `parts` make of it, None for an atom proper.
      parts: its factors, the slowest first, or its segments in order.
      factor: whether it is a factor of a product, which cannot be cut.
      contexts: each restricts the atoms that its permutation may depend on; a list of those that it may depend on, and
        all of them must agree.
      forbidden: atoms that its permutation may not depend on.
      pending: the split that makes this atom, while nothing but layout depends on it.
      number: the order of creation.
    """

    __slots__ = (
        "contexts",
        "factor",
        "fixed",
        "forbidden",
        "kind",
        "number",
        "parts",
        "pending",
        "size",
        "tied",
    )

    def __init__(
        self,
        size: int,
        *,
        fixed: bool = False,
        contexts: Sequence[tuple[Atom, ...]] = (),
        factor: bool = False,
    ) -> None:
        self.size = size
        self.fixed = fixed
        self.factor = factor
        self.contexts = list(contexts)
        self.forbidden: list[Atom] = []
        self.kind: Literal["product", "concatenation"] | None = None
        self.parts: list[Atom] = []
        self.tied: Atom | None = None
        self.pending: Split | None = None
        self.number = next(_COUNTER)


class Split:
    """A reshape of one atom into factors that is not carried out before it must be.

    A program may cut along the slowest factor next (a fused projection, reshaped to [3, heads, width] and then taken
    apart). Then the atom is a concatenation of three, whose parts need not be relabelled alike.
    """

    def __init__(self, atom: Atom, sizes: Sequence[int]) -> None:
        self.atom = atom
        self.factors = [Atom(size) for size in sizes]
        for factor in self.factors:
            factor.pending = self

    def carry_out(self) -> None:
        """Makes the factors what the atom is a product of."""
        for factor in self.factors:
            factor.pending = None
        unify([[self.atom]], [list(self.factors)])


Segment = list[Atom]
# What an axis is: the concatenation of row-major products of atoms. None where the value is the same all along it.
Label = list[Segment] | None


def find(atom: Atom) -> Atom:
    """The atom that stands for this one."""
    if atom.pending is not None:
        atom.pending.carry_out()
    root = atom
    while root.tied is not None:
        root = root.tied
    while atom.tied is not None:
        atom.tied, atom = root, atom.tied
    return root


def factors(atom: Atom) -> list[Atom]:
    """What the atom is a product of; a concatenation stays whole."""
    atom = find(atom)
    if atom.kind == "product":
        return [factor for part in atom.parts for factor in factors(part)]
    return [atom]


def proper(atom: Atom) -> list[Atom]:
    """All atoms proper that the atom is made of."""
    atom = find(atom)
    return [atom] if atom.kind is None else [a for part in atom.parts for a in proper(part)]


def flat(label: list[Segment]) -> list[Segment]:
    """The label in atoms proper, as far as products and whole segments allow."""
    segments: list[Segment] = []
    for segment in label:
        segment = [factor for atom in segment for factor in factors(atom)]
        if len(segment) == 1 and segment[0].kind == "concatenation":
            segments += flat([[part] for part in segment[0].parts])
        else:
            segments.append(segment)
    return segments


def length(segment: Segment) -> int:
    return math.prod(atom.size for atom in segment)


def fixed_axis(size: int) -> Label:
    """The label of an axis whose indices the program tells apart."""
    return [[Atom(size, fixed=True)]] if size > 1 else None


def fix(label: Label) -> None:
    """Forbids every relabelling along an axis."""
    for segment in label or []:
        for atom in segment:
            for one in proper(atom):
                one.fixed = True


def unify(first: Label, second: Label) -> Label:
    """Ties two axes together index by index, and returns what they have become."""
    if first is None or second is None:
        return second if first is None else first
    first, second = flat(first), flat(second)
    lengths = [length(segment) for segment in first], [length(segment) for segment in second]
    if lengths[0] != lengths[1]:
        ends = sorted({*itertools.accumulate(lengths[0]), *itertools.accumulate(lengths[1])})
        return unify(cut(first, ends), cut(second, ends))
    for one, other in zip(first, second, strict=True):
        _unify_segments(one, other)
    return flat(first)


def cut(label: list[Segment], ends: Iterable[int]) -> list[Segment]:
    """Cuts an axis at the given positions into segments; a factor of a product is fixed instead."""
    segments: list[Segment] = []
    start = 0
    for segment in flat(label):
        size = length(segment)
        inside = sorted({end - start for end in ends if start < end < start + size})
        start += size
        if not inside:
            segments.append(segment)
            continue
        sizes = [b - a for a, b in itertools.pairwise([0, *inside, size])]
        atom = segment[0]
        if len(segment) == 1 and not atom.factor and atom.kind is None:
            atom.kind = "concatenation"
            atom.parts = [Atom(n, fixed=atom.fixed, contexts=atom.contexts) for n in sizes]
            for part in atom.parts:
                part.forbidden = list(atom.forbidden)
            segments += [[part] for part in atom.parts]
        else:
            fix([segment])
            segments += [[Atom(n, fixed=True)] for n in sizes]
    return segments


def split(atom: Atom, sizes: Sequence[int]) -> list[Atom]:
    """Makes an atom proper a row-major product; the permutation of a factor may depend on the factors before it."""
    atom = find(atom)
    parts: list[Atom] = []
    for size in sizes:
        contexts = [(*context, *parts) for context in atom.contexts]
        part = Atom(size, fixed=atom.fixed, contexts=contexts, factor=True)
        part.forbidden = list(atom.forbidden)
        parts.append(part)
    atom.kind, atom.parts = "product", parts
    return parts


def forget(kept: Iterable[Label], gone: Iterable[Label]) -> None:
    """Axes disappear while others stay: the permutations of these may no longer depend on those."""
    lost = [atom for label in gone for segment in label or [] for atom in segment]
    if not lost:
        return
    for label in kept:
        for segment in label or []:
            for atom in segment:
                for one in proper(atom):
                    if not one.fixed:
                        one.forbidden += lost


def dependence(atom: Atom) -> list[Atom]:
    """The atoms proper that the permutation of an atom may depend on, in order of creation."""
    atom = find(atom)
    if atom.fixed or not atom.contexts:
        return []
    allowed = [{a for context_atom in c for a in proper(context_atom)} for c in atom.contexts]
    refused = {a for lost in atom.forbidden for a in proper(lost)}
    common = set.intersection(*allowed) - refused - {atom}
    return sorted(common, key=lambda a: a.number)


def _unify_segments(first: Segment, second: Segment) -> None:
    first, second = list(first), list(second)
    i = 0
    while i < len(first) and i < len(second):
        one, other = find(first[i]), find(second[i])
        if one.kind == "product" or other.kind == "product":
            first[i : i + 1], second[i : i + 1] = factors(one), factors(other)
            one, other = find(first[i]), find(second[i])
        if one.size == other.size:
            _tie(one, other)
        elif one.size % other.size == 0 and one.kind is None:
            first[i : i + 1] = split(one, [other.size, one.size // other.size])
            _tie(find(first[i]), other)
        elif other.size % one.size == 0 and other.kind is None:
            second[i : i + 1] = split(other, [one.size, other.size // one.size])
            _tie(one, find(second[i]))
        else:
            fix([first[i:]])
            fix([second[i:]])
            return
        i += 1


def _tie(one: Atom, other: Atom) -> None:
    one, other = find(one), find(other)
    if one is other:
        return
    if one.kind is not None and other.kind is None:
        one, other = other, one
    if one.kind is not None:
        unify([[one]], [[other]])
        return
    one.tied = other
    if other.kind is None:
        other.fixed |= one.fixed
        other.factor |= one.factor
        other.contexts += one.contexts
        other.forbidden += one.forbidden
        return
    for part in proper(other):
        part.fixed |= one.fixed
        part.forbidden += one.forbidden
    _restrict(other, one.contexts)


def _restrict(atom: Atom, contexts: Sequence[tuple[Atom, ...]]) -> None:
    """Puts further contexts on the parts of a product or concatenation."""
    before: list[Atom] = []
    for part in map(find, atom.parts):
        mine = [(*context, *before) for context in contexts]
        if part.kind is None:
            part.contexts += mine
        else:
            _restrict(part, mine)
        if atom.kind == "product":
            before.append(part)
