"""Merge methods: pairs of pure functions over any pytree, in one registry."""

from jaxmerge.methods.averages import linear
from jaxmerge.methods.by_block import by_block
from jaxmerge.methods.choose import choose
from jaxmerge.methods.hyperparameters import Fraction, Hyperparameter
from jaxmerge.methods.leaf import Chunk, LeafMethod, Select, Sums
from jaxmerge.methods.merging import merge
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.registry import allowed, get, names, options, register
from jaxmerge.methods.spherical import slerp
from jaxmerge.methods.task_vectors import dare_linear, dare_ties, task_arithmetic, ties

__all__ = [
    "Chunk",
    "Fraction",
    "Hyperparameter",
    "LeafMethod",
    "MergeMethod",
    "Select",
    "Sums",
    "allowed",
    "by_block",
    "choose",
    "dare_linear",
    "dare_ties",
    "from_leaf",
    "get",
    "linear",
    "merge",
    "names",
    "options",
    "register",
    "slerp",
    "task_arithmetic",
    "ties",
]
