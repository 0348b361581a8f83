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
from jaxmerge.methods.operators.cart import cart
from jaxmerge.methods.operators.emr import emr
from jaxmerge.methods.operators.fisher import fisher, uncertainty
from jaxmerge.methods.operators.isotropic import iso_c, iso_cts
from jaxmerge.methods.operators.karcher import karcher
from jaxmerge.methods.operators.knots import knots
from jaxmerge.methods.operators.lines import lines
from jaxmerge.methods.operators.magmax import magmax
from jaxmerge.methods.operators.mats import mats
from jaxmerge.methods.operators.median import median
from jaxmerge.methods.operators.metagpt import metagpt
from jaxmerge.methods.operators.model_stock import model_stock
from jaxmerge.methods.operators.multislerp import multislerp
from jaxmerge.methods.operators.nearswap import nearswap
from jaxmerge.methods.operators.negmerge import negmerge
from jaxmerge.methods.operators.opcm import opcm
from jaxmerge.methods.operators.passthrough import passthrough
from jaxmerge.methods.operators.pcb import pcb
from jaxmerge.methods.operators.ram import ram, ramplus_tl
from jaxmerge.methods.operators.regmean import regmean
from jaxmerge.methods.operators.sce import sce
from jaxmerge.methods.operators.spherical import nuslerp, slerp
from jaxmerge.methods.operators.star import star
from jaxmerge.methods.operators.tall_masks import consensus, tall_masks
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
from jaxmerge.methods.operators.tsv import tsv
from jaxmerge.methods.operators.wise_ft import wise_ft
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
    "cart",
    "choose",
    "consensus",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "emr",
    "fisher",
    "for_task",
    "from_leaf",
    "get",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "linear",
    "lines",
    "magmax",
    "mats",
    "median",
    "merge",
    "metagpt",
    "model_stock",
    "multislerp",
    "names",
    "nearswap",
    "negmerge",
    "nuslerp",
    "opcm",
    "options",
    "passthrough",
    "pcb",
    "ram",
    "ramplus_tl",
    "register",
    "regmean",
    "sce",
    "slerp",
    "star",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "tsv",
    "uncertainty",
    "wise_ft",
    "wudi",
]
