"""jaxmerge: merge neural networks in JAX.

import jaxmerge as jm
merged = jm.merge("ties", [a, b], base=base, weight=[0.5, 0.7], density=0.3)
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxmerge._version import __version__

if TYPE_CHECKING:
    from jaxmerge import (
        align,
        evaluation,
        fusion,
        learning,
        methods,
        models,
        search,
        statistics,
        tree,
    )
    from jaxmerge.methods import MergeMethod, merge

__all__ = [
    "MergeMethod",
    "__version__",
    "align",
    "evaluation",
    "fusion",
    "learning",
    "merge",
    "methods",
    "models",
    "search",
    "statistics",
    "tree",
]


def __getattr__(name: str) -> Any:
    # Loaded at first use: the command line answers `--help` without waiting for JAX.
    if name in ("MergeMethod", "merge"):
        return getattr(importlib.import_module("jaxmerge.methods"), name)
    if name in __all__:
        return importlib.import_module(f"jaxmerge.{name}")
    raise AttributeError(f"module 'jaxmerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
