"""Alignment: which units of which model correspond, and models brought into each other's order."""

from jaxmerge.align.assignment import assign, sinkhorn
from jaxmerge.align.batch_norm import reset_batch_norm
from jaxmerge.align.describing import describe
from jaxmerge.align.many import ManyInfo, between, match_many
from jaxmerge.align.matching import MatchInfo, match, match_path, match_restarts
from jaxmerge.align.permuting import Permutations, compose, identity, inverse, permute, random
from jaxmerge.align.repairing import RepairInfo, repair
from jaxmerge.align.similarity import activation_similarity, weight_similarity
from jaxmerge.align.spaces import Space, activation_space, dual_space, weight_space
from jaxmerge.align.spec import Axis, Binding, Node, PermutationSpec
from jaxmerge.align.splitting import split_trees
from jaxmerge.align.straight import StraightInfo, match_ste
from jaxmerge.align.symmetry import symmetry
from jaxmerge.align.transporting import transport
from jaxmerge.align.verifying import verify
from jaxmerge.align.zipping import ZipInfo, merge_matrices, partial_zip, zipit
from jaxmerge.fusion.paths import barrier

__all__ = [
    "Axis",
    "Binding",
    "ManyInfo",
    "MatchInfo",
    "Node",
    "PermutationSpec",
    "Permutations",
    "RepairInfo",
    "Space",
    "StraightInfo",
    "ZipInfo",
    "activation_similarity",
    "activation_space",
    "assign",
    "barrier",
    "between",
    "compose",
    "describe",
    "dual_space",
    "identity",
    "inverse",
    "match",
    "match_many",
    "match_path",
    "match_restarts",
    "match_ste",
    "merge_matrices",
    "partial_zip",
    "permute",
    "random",
    "repair",
    "reset_batch_norm",
    "sinkhorn",
    "split_trees",
    "symmetry",
    "transport",
    "verify",
    "weight_similarity",
    "weight_space",
    "zipit",
]
