"""Search: what may vary, and who looks for the best of it, in one compiled program."""

from jaxmerge.search import anchors, halving, pareto
from jaxmerge.search.blockwise import AutoMerge, automerge, segment
from jaxmerge.search.dataflow import dataflow
from jaxmerge.search.evolve import Result, evolve
from jaxmerge.search.factored import factored
from jaxmerge.search.space import Column, Space, space
from jaxmerge.search.spaces_of import space_of
from jaxmerge.search.strategies import Strategy, strategy, strategy_names
from jaxmerge.search.variables import binary, categorical, continuous, integer, when

__all__ = [
    "AutoMerge",
    "Column",
    "Result",
    "Space",
    "Strategy",
    "anchors",
    "automerge",
    "binary",
    "categorical",
    "continuous",
    "dataflow",
    "evolve",
    "factored",
    "halving",
    "integer",
    "pareto",
    "segment",
    "space",
    "space_of",
    "strategy",
    "strategy_names",
    "when",
]
