"""How the C library keeps memory, for commands that take and free arrays of a few megabytes all the time."""

import ctypes
import sys

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The largest that glibc takes; larger arrays go back to the system as soon as they are freed.
_KEPT = 1 << 25


def keep_freed_memory() -> None:
    """Lets freed arrays of up to 32 MiB be taken again, rather than from the system with every page to be cleared.

    A merge spends half of its system time on such pages otherwise. Does nothing where the C library is another one.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _KEPT)
        mallopt(_TRIM_THRESHOLD, 1 << 30)
