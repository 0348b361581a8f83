"""Streaming: merges planned tensors piece by piece, in bounded memory, by the leaf functions that merge in memory."""

from jaxmerge.recipes.streaming.memory import default_limit, memory_needed, parse_limit
from jaxmerge.recipes.streaming.merging import merged
from jaxmerge.recipes.streaming.piece import Piece

__all__ = ["Piece", "default_limit", "memory_needed", "merged", "parse_limit"]
