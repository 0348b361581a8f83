"""Pytrees of parameters: string paths, selection, values per block, layouts and tensor identity."""

from jaxmerge.tree.blocks import PerBlock, per_block
from jaxmerge.tree.depth import depths, layer_of
from jaxmerge.tree.identity import name_words
from jaxmerge.tree.layout import Layout, TensorLayout, stacked_layout
from jaxmerge.tree.paths import flatten, matches, nearest, paths, select, unflatten
from jaxmerge.tree.stacking import stack, unstack

__all__ = [
    "Layout",
    "PerBlock",
    "TensorLayout",
    "depths",
    "flatten",
    "layer_of",
    "matches",
    "name_words",
    "nearest",
    "paths",
    "per_block",
    "select",
    "stack",
    "stacked_layout",
    "unflatten",
    "unstack",
]
