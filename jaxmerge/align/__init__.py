"""Alignment: which units of which model correspond, and models brought into each other's order."""

from jaxmerge.align.assignment import assign, sinkhorn
from jaxmerge.align.describing import describe
from jaxmerge.align.matching import MatchInfo, match, match_path
from jaxmerge.align.permuting import Permutations, compose, identity, inverse, permute, random
from jaxmerge.align.similarity import activation_similarity, weight_similarity
from jaxmerge.align.spaces import Space, activation_space, dual_space, weight_space
from jaxmerge.align.spec import Axis, Binding, Node, PermutationSpec
from jaxmerge.align.symmetry import symmetry
from jaxmerge.align.verifying import verify

__all__ = [
    "Axis",
    "Binding",
    "MatchInfo",
    "Node",
    "PermutationSpec",
    "Permutations",
    "Space",
    "activation_similarity",
    "activation_space",
    "assign",
    "compose",
    "describe",
    "dual_space",
    "identity",
    "inverse",
    "match",
    "match_path",
    "permute",
    "random",
    "sinkhorn",
    "symmetry",
    "verify",
    "weight_similarity",
    "weight_space",
]
