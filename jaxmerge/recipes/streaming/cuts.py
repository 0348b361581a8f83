"""Where a tensor is cut: into runs of few lengths, so that few programs are compiled whatever the shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from jaxmerge.methods.leaf import Cuts

LARGEST = 1 << 19
"""The most elements of a cut, where not more than four arrays are read for one."""


class Cut(NamedTuple):
    """Elements start..stop of a tensor, and the shape in which a method sees them."""

    start: int
    stop: int
    shape: tuple[int, ...]


def cuts_of(how: Cuts, shape: tuple[int, ...], arrays: int = 1) -> list[Cut]:
    """Cuts a tensor as far as a method allows.

    The cuts depend on nothing but the arguments: sums over cuts round the same in every run, however much memory there
    is.

    Args:
      how: `LeafMethod.cuts`.
      shape: the tensor's.
      arrays: how many arrays of this shape are read, which makes the cuts smaller.

    Returns:
      The cuts, in order.

    Example:
      >>> cuts_of("elements", (5, 2)), cuts_of("rows", (3, 2))
      ([Cut(start=0, stop=8, shape=(8,)), Cut(start=8, stop=10, shape=(2,))],
       [Cut(start=0, stop=4, shape=(2, 2)), Cut(start=4, stop=6, shape=(1, 2))])
    """
    size, most = math.prod(shape), longest(arrays)
    if how == "elements":
        return [Cut(start, stop, (stop - start,)) for start, stop in _runs(size, most)]
    if how == "rows" and len(shape) > 1:
        row = size // shape[0]
        return [
            Cut(start * row, stop * row, (stop - start, *shape[1:]))
            for start, stop in _runs(shape[0], max(1, most // row))
        ]
    return [Cut(0, size, shape)]


def longest(arrays: int) -> int:
    """The most elements of a cut, where so many arrays are read for one."""
    return LARGEST >> max(0, (arrays - 1).bit_length() - 2)


def _runs(length: int, longest: int) -> Iterator[tuple[int, int]]:
    """Runs whose lengths are powers of two: nothing is padded, and there are few lengths."""
    start = 0
    while start < length:
        stop = start + (1 << (min(longest, length - start).bit_length() - 1))
        yield start, stop
        start = stop
