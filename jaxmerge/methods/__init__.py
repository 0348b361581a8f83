"""Merge methods: pairs of pure functions over any pytree, in one registry."""

from jaxmerge.methods.by_block import by_block
from jaxmerge.methods.choose import choose
from jaxmerge.methods.extras import Extra, Gram
from jaxmerge.methods.hyperparameters import Fraction, Hyperparameter
from jaxmerge.methods.leaf import Chunk, LeafMethod, Local, Select, Sums
from jaxmerge.methods.merging import merge
from jaxmerge.methods.method import MergeMethod, from_leaf
from jaxmerge.methods.operators.arcee_fusion import arcee_fusion
from jaxmerge.methods.operators.averages import linear
from jaxmerge.methods.operators.fisher import fisher, uncertainty
from jaxmerge.methods.operators.karcher import karcher
from jaxmerge.methods.operators.mats import mats
from jaxmerge.methods.operators.model_stock import model_stock
from jaxmerge.methods.operators.multislerp import multislerp
from jaxmerge.methods.operators.nearswap import nearswap
from jaxmerge.methods.operators.passthrough import passthrough
from jaxmerge.methods.operators.ram import ram, ramplus_tl
from jaxmerge.methods.operators.regmean import regmean
from jaxmerge.methods.operators.sce import sce
from jaxmerge.methods.operators.spherical import nuslerp, slerp
from jaxmerge.methods.operators.task_vectors import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    task_arithmetic,
    ties,
)
from jaxmerge.methods.operators.wudi import wudi
from jaxmerge.methods.per_task import PerTask, for_task
from jaxmerge.methods.registry import allowed, get, names, options, register

__all__ = [
    "Chunk",
    "Extra",
    "Fraction",
    "Gram",
    "Hyperparameter",
    "LeafMethod",
    "Local",
    "MergeMethod",
    "PerTask",
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
    "fisher",
    "for_task",
    "from_leaf",
    "get",
    "karcher",
    "linear",
    "mats",
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
    "regmean",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
    "uncertainty",
    "wudi",
]
