"""Where in a program the activations of a node's units are looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import JaxprEqn

from jaxmerge.align.spec import PermutationSpec
from jaxmerge.align.symmetry import labelled
from jaxmerge.align.symmetry.atoms import Atom, Label, flat, proper
from jaxmerge.align.symmetry.values import Position, Traced, Value, shape_of
from jaxmerge.align.trees import Chain, Place, trees


@dataclass(frozen=True)
class Site:
    """An operand of an operation, and how a node's units lie in it.

    Attributes:
      position: where the operation stands, see `jaxmerge.align.symmetry.values.Position`.
      operand: which operand.
      shape: the operand's shape, axes that hold units taken apart into their factors.
      units: the axes of `shape` that run over the units of the node's parents and of the node, the outermost first;
        the others run over examples and positions, which are the same in every model.
      rank: how many axes the operand has.
    """

    position: Position
    operand: int
    shape: tuple[int, ...]
    units: tuple[int, ...]
    rank: int

    def samples(self) -> int:
        """How many examples and positions there are."""
        return math.prod(n for i, n in enumerate(self.shape) if i not in self.units)


def find_sites(
    spec: PermutationSpec, apply_fn: Callable[..., Any], params: Any, *inputs: Any
) -> dict[str, tuple[Site, ...]]:
    """Finds where the activations of every node are looked at: what its last consumer reads.

    That is the input of the last linear layer that reads the units; where this is an average over positions, what is
    averaged. The units of queries and keys, which no layer reads, are looked at where their products are made.

    Args:
      spec: derived or written by hand.
      apply_fn, params, inputs: the model, as for `jaxmerge.align.symmetry`; shapes are enough.

    Returns:
      Per free node one site or several (whose activations count alike); none where the program never forms the node's
      units.
    """
    labels, uses = labelled(apply_fn, params, inputs)
    found = {}
    for tree in trees(spec):
        for chain in tree.chains:
            found[chain.node] = _sites(chain, labels, uses.operations)
    return found


def _sites(
    chain: Chain,
    labels: Mapping[str, list[Label]],
    operations: Sequence[tuple[Position, JaxprEqn, list[Value]]],
) -> tuple[Site, ...]:
    wanted = list(
        dict.fromkeys(filter(None, (_atoms(chain, place, labels) for place in chain.places)))
    )
    readers = {place.path for place in chain.places if place.role in ("in", "both")}
    last: Site | None = None
    averaged: Site | None = None
    multiplied: list[Site] = []
    for position, eqn, operands in operations:
        name = eqn.primitive.name
        reads = bool({v.path for v in operands if isinstance(v, Traced)} & readers)
        for i, operand in enumerate(operands):
            if not isinstance(operand, Traced) or operand.path is not None:
                continue
            site = _site(position, i, operand, shape_of(eqn.invars[i]), wanted)
            if site is None:
                continue
            if name in ("dot_general", "conv_general_dilated") and reads:
                pooled = averaged is not None and averaged.samples() > site.samples()
                last, averaged = averaged if pooled else site, None
            elif _averages(eqn, operand, wanted):
                averaged = max(averaged or site, site, key=Site.samples)
            elif name == "dot_general":
                multiplied.append(site)
    if last is not None:
        return (last,)
    if multiplied:
        return tuple(site for site in multiplied if site.position == multiplied[-1].position)
    return () if averaged is None else (averaged,)


def _atoms(
    chain: Chain, place: Place, labels: Mapping[str, list[Label]]
) -> tuple[Atom, ...] | None:
    """The atoms of a node's outer parents and of the node, the outermost first, as a leaf has them."""
    found: dict[str, Atom] = {}
    for axis, segment, names in place.nodes:
        label = labels[place.path][axis]
        segments = [] if label is None else flat(label)
        if segment >= len(segments) or len(segments[segment]) < len(names):
            continue
        # A run of factors that do not move may be one atom or several: counted from the side where the node stands.
        atoms = _by_name(segments[segment], names)
        found.update(atoms)
    order = (*chain.outer, chain.node)
    return tuple(found[name] for name in order) if all(name in found for name in order) else None


def _by_name(atoms: Sequence[Atom], names: Sequence[tuple[str | None, int]]) -> dict[str, Atom]:
    """Matches atoms with named factors by position and size; factors without a name may be several atoms."""
    found: dict[str, Atom] = {}
    left = list(atoms)
    for name, size in names:
        if not left:
            return {}
        if name is not None:
            if left[0].size != size:
                return {}
            found[name] = left.pop(0)
            continue
        covered = 1
        while left and covered < size:
            covered *= left.pop(0).size
        if covered != size:
            return {}
    return found


def _site(
    position: Position,
    operand: int,
    value: Traced,
    shape: Sequence[int],
    wanted: Sequence[tuple[Atom, ...]],
) -> Site | None:
    """The operand as a site: all of the units in it, everything else the same in every model."""
    for atoms in wanted:
        sizes: list[int] = []
        where: dict[Atom, int] = {}
        for label, size in zip(value.labels, shape, strict=True):
            segments = [] if label is None else flat(label)
            mine = [a for segment in segments for a in segment if a in atoms]
            if not mine:
                if any(_moves(a) for segment in segments for b in segment for a in proper(b)):
                    break
                sizes.append(size)
                continue
            if len(segments) > 1 or any(a not in mine and _moves(a) for a in segments[0]):
                break
            for atom in segments[0]:
                if atom in atoms:
                    where[atom] = len(sizes)
                sizes.append(atom.size)
        else:
            if all(atom in where for atom in atoms):
                units = tuple(where[atom] for atom in atoms)
                return Site(position, operand, tuple(sizes), units, len(shape))
    return None


def _moves(atom: Atom) -> bool:
    """Whether models may differ along an atom: not where there is one index (a class token before the others)."""
    return not atom.fixed and atom.size > 1


def _averages(eqn: JaxprEqn, operand: Traced, wanted: Sequence[tuple[Atom, ...]]) -> bool:
    """Whether an operation reduces over positions and leaves the units."""
    atoms = {atom for one in wanted for atom in one}
    axes = [
        i
        for i, label in enumerate(operand.labels)
        if any(atom in atoms for segment in (flat(label) if label else ()) for atom in segment)
    ]
    if eqn.primitive.name in ("reduce_sum", "reduce_max"):
        return not set(axes) & set(eqn.params["axes"])
    if eqn.primitive.name.startswith("reduce_window"):
        return all(eqn.params["window_dimensions"][i] == 1 for i in axes)
    return False
