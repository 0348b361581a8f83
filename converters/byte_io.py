"""Whole reads and writes of buffers at file offsets, safe to call from several threads."""

from __future__ import annotations

import os

import numpy as np

from jaxmerge.converters.errors import CheckpointError

# One system call moves at most 2 GiB on Linux and macOS.
_LARGEST_CALL = 1 << 30
_ALIGNMENT = 64


def read_into(fd: int, buffer: memoryview, offset: int, what: str) -> None:
    """Fills `buffer` from `fd` at `offset`; no pages are mapped, nothing else is allocated.

    Args:
      fd: an open file descriptor.
      buffer: writable bytes.
      offset: where in the file to start.
      what: file and tensor, for the message.

    Raises:
      CheckpointError: the file ends early.
    """
    done = 0
    while done < len(buffer):
        part = buffer[done : done + _LARGEST_CALL]
        got = os.preadv(fd, [part], offset + done)
        if got == 0:
            raise CheckpointError(
                f"{what}: expected {len(buffer)} bytes, found {done}: the file was cut short after "
                "it was opened"
            )
        done += got


def write_all(fd: int, buffer: memoryview, offset: int) -> None:
    """Writes all of `buffer` to `fd` at `offset`.

    Args:
      fd: an open file descriptor.
      buffer: the bytes.
      offset: where in the file to start.

    Raises:
      OSError: the system refuses, for example since the disk is full.
    """
    done = 0
    while done < len(buffer):
        done += os.pwrite(fd, buffer[done : done + _LARGEST_CALL], offset + done)


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """Returns a new, unset 1-D array that begins at a multiple of 64 bytes: JAX takes such an array without a copy.

    Args:
      size: how many elements.
      dtype: of what type.

    Example:
      >>> aligned(3, np.dtype(np.float32)).ctypes.data % 64
      0
    """
    room = np.empty(size * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size * dtype.itemsize].view(dtype)


def as_bytes(array: np.ndarray) -> memoryview:
    """Returns the bytes of a C-contiguous array without a copy.

    Args:
      array: any C-contiguous array, of any dtype and shape, ml_dtypes included.

    Returns:
      A flat view of its bytes, writable if the array is.
    """
    return array.reshape(-1).view(np.uint8).data
