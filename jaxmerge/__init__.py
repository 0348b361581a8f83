"""jaxmerge: merge neural networks in JAX."""

from jaxmerge._version import __version__

__all__ = ["__version__"]
