"""Pytrees of parameters: string paths, selection, values per block, layouts and tensor identity."""

from jaxmerge.tree.blocks import PerBlock, per_block
from jaxmerge.tree.identity import name_words
from jaxmerge.tree.layout import Layout, TensorLayout, stacked_layout
from jaxmerge.tree.paths import flatten, matches, nearest, paths, select, unflatten
from jaxmerge.tree.stacking import stack, unstack

__all__ = [
    "Layout",
    "PerBlock",
    "TensorLayout",
    "flatten",
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
