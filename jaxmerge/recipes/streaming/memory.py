"""How much memory a streamed merge may take, and how it is shared out."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxmerge.converters.dtypes import storage_dtype
from jaxmerge.free_memory import available_memory, resident_memory
from jaxmerge.recipes.output import parse_bytes
from jaxmerge.recipes.streaming.cuts import cuts_of, longest

if TYPE_CHECKING:
    from jaxmerge.recipes.plan import PlannedMerge, PlannedTensor

INTERPRETER = 320 << 20
"""What Python, JAX and compiled programs take by themselves."""

_PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_UNKNOWN = 4 << 30
# More than these brings no speed.
_MOST_THREADS = 16
_COMFORTABLE = 256 << 20


class Shares(NamedTuple):
    """How memory is shared out.

    Attributes:
      threads: how many cuts are computed at once.
      kept: bytes of sources that may be kept between passes over them.
    """

    threads: int
    kept: int


def parse_limit(text: str) -> int:
    """The bytes of a memory limit as people write it; a percentage is of what is free now.

    Raises:
      ValueError: it is no amount of memory.

    Example:
      >>> parse_limit("1GiB"), parse_limit("512 MB")
      (1073741824, 512000000)
    """
    share = _PERCENTAGE.fullmatch(text.strip())
    if share is None:
        return parse_bytes(text)
    if not 0 < float(share[1]) <= 100:
        raise ValueError(f"expected a share of the free memory from 0 to 100%, found {text!r}")
    return int(float(share[1]) / 100 * _free())


def default_limit() -> int:
    """Three quarters of what is free."""
    return _free() * 3 // 4


def memory_needed(tensors: Iterable[PlannedTensor], merges: Sequence[PlannedMerge]) -> int:
    """The bytes that merging takes at least.

    That is what Python and JAX take, and one cut of a tensor: of n elements of S inputs, the inputs as stored, S
    float32 copies and two more for the result and for scratch, and the output as stored,

        sum_s bytes_s + 4 n (S + 2) + bytes_out

    at the largest cut. A method that cannot cut a tensor needs all of it, and as much again for its factors; one that
    is not built from a leaf method needs all tensors at once.

    Args:
      tensors: those of the plan.
      merges: those of the plan.
    """
    most, together = 0, 0
    for tensor in tensors:
        if tensor.action == "carry":
            continue
        leaf = merges[tensor.merge].method.leaf
        size = math.prod(tensor.shape)
        if leaf is None:
            together += _of_cut(tensor, size)
            continue
        arrays = len(tensor.inputs)
        cuts = cuts_of(leaf.cuts, tensor.shape, arrays)
        largest = max(min(size, longest(arrays)), *(cut.stop - cut.start for cut in cuts))
        needed = _of_cut(tensor, largest)
        if leaf.cuts == "never":
            needed += 4 * size * (len(tensor.inputs) + 1)
        most = max(most, needed)
    return INTERPRETER + max(most, together)


def shares(limit: int, tensors: Iterable[PlannedTensor], merges: Sequence[PlannedMerge]) -> Shares:
    """Shares out what a limit leaves beside what the process holds already.

    Args:
      limit: bytes that the process may hold.
      tensors: those of the plan.
      merges: those of the plan.
    """
    cut = max(1, memory_needed(tensors, merges) - INTERPRETER)
    left = max(0, limit - INTERPRETER)
    threads = max(1, min(_cores(), _MOST_THREADS, left // (2 * cut)))
    return Shares(threads, max(0, min(_COMFORTABLE, left - 2 * threads * cut)))


def _of_cut(tensor: PlannedTensor, size: int) -> int:
    inputs = set(tensor.inputs)
    stored = sum(storage_dtype(one.dtype).itemsize for one in inputs)
    out = storage_dtype(tensor.dtype).itemsize
    return size * (stored + 4 * (len(inputs) + 2) + out)


def _free() -> int:
    """What the machine, or the container, has for this process, with what it holds already."""
    return (available_memory() or _UNKNOWN) + resident_memory()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
