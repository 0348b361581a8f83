"""Giving mapped pages back, so that a file read through a mapping does not stay resident."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable


def drop(address: int, nbytes: int) -> None:
    """Drops the resident pages that a range of a clean file mapping touches.

    Later reads fetch them from the file again. Only for mappings of files to which nobody wrote:
    elsewhere it would lose data. Does nothing on systems other than Linux.

    Args:
      address: the first byte.
      nbytes: how many.
    """
    advise = _madvise()
    if advise is None or nbytes == 0:
        return
    start = address - address % mmap.PAGESIZE
    advise(start, address + nbytes - start, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function
