"""AutoMerge: blocks of a model, and for each the technique and the hyperparameters that a search finds."""

from jaxmerge.search.blockwise.scoring import balanced, discrepancy, preservation
from jaxmerge.search.blockwise.searching import AutoMerge, automerge
from jaxmerge.search.blockwise.segmenting import segment

__all__ = ["AutoMerge", "automerge", "balanced", "discrepancy", "preservation", "segment"]
