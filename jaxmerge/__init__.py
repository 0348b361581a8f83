"""jaxmerge: merge neural networks in JAX.

    import jaxmerge as jm
    merged = jm.merge("ties", [a, b], base=base, weight=[0.5, 0.7], density=0.3)
"""

from jaxmerge import methods, tree
from jaxmerge._version import __version__
from jaxmerge.methods import MergeMethod, merge

__all__ = ["MergeMethod", "__version__", "merge", "methods", "tree"]
