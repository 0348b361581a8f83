"""How much memory is free for a computation, and how much this process holds."""

import os
from pathlib import Path

import jax

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available_memory(device: jax.Device | None = None) -> int | None:
    """Returns the bytes that are free on a device, as far as the system tells.

    On an accelerator: its limit less what is in use. On the CPU: what the machine has available, or
    what a container may still use if that is less.

    Args:
        device: default: the one that JAX computes on.
    """
    device = jax.local_devices()[0] if device is None else device
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
        return None
    known = [one for one in (_of_machine(), *map(_of_container, _CGROUPS)) if one is not None]
    return min(known, default=None)


def resident_memory() -> int:
    """Returns the bytes of memory that this process holds now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        # Not what is free, but what there is: systems without /proc tell no more.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _of_container(files: tuple[str, str]) -> int | None:
    try:
        limit, used = (Path(file).read_text(encoding="ascii").strip() for file in files)
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None
