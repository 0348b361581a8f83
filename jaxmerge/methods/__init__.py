"""Merge methods: pairs of pure functions over any pytree, in one registry."""

from jaxmerge.methods.arcee_fusion import arcee_fusion
from jaxmerge.methods.averages import linear
from jaxmerge.methods.by_block import by_block
from jaxmerge.methods.choose import choose
from jaxmerge.methods.hyperparameters import Fraction, Hyperparameter
from jaxmerge.methods.karcher import karcher
from jaxmerge.methods.leaf import Chunk, LeafMethod, Local, Select, Sums
from jaxmerge.methods.merging import merge
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.model_stock import model_stock
from jaxmerge.methods.multislerp import multislerp
from jaxmerge.methods.nearswap import nearswap
from jaxmerge.methods.passthrough import passthrough
from jaxmerge.methods.ram import ram, ramplus_tl
from jaxmerge.methods.registry import allowed, get, names, options, register
from jaxmerge.methods.sce import sce
from jaxmerge.methods.spherical import nuslerp, slerp
from jaxmerge.methods.task_vectors import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    task_arithmetic,
    ties,
)

__all__ = [
    "Chunk",
    "Fraction",
    "Hyperparameter",
    "LeafMethod",
    "Local",
    "MergeMethod",
    "Select",
    "Sums",
    "allowed",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "by_block",
    "choose",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "from_leaf",
    "get",
    "karcher",
    "linear",
    "merge",
    "model_stock",
    "multislerp",
    "names",
    "nearswap",
    "nuslerp",
    "options",
    "passthrough",
    "ram",
    "ramplus_tl",
    "register",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
]
