"""Alignment: which units of which model correspond, and models brought into each other's order."""

from jaxmerge.align.assignment import assign, sinkhorn
from jaxmerge.align.describing import describe
from jaxmerge.align.permuting import Permutations, compose, identity, inverse, permute, random
from jaxmerge.align.spec import Axis, Binding, Node, PermutationSpec
from jaxmerge.align.symmetry import symmetry
from jaxmerge.align.verifying import verify

__all__ = [
    "Axis",
    "Binding",
    "Node",
    "PermutationSpec",
    "Permutations",
    "assign",
    "compose",
    "describe",
    "identity",
    "inverse",
    "permute",
    "random",
    "sinkhorn",
    "symmetry",
    "verify",
]
