"""Search: what may vary, and who looks for the best of it, in one compiled program."""

from jaxmerge.search.space import Column, Space, space
from jaxmerge.search.spaces_of import space_of
from jaxmerge.search.variables import binary, categorical, continuous, integer, when

__all__ = [
    "Column",
    "Space",
    "binary",
    "categorical",
    "continuous",
    "integer",
    "space",
    "space_of",
    "when",
]
