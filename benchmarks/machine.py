"""What a benchmark ran on: printed above every table and kept in its JSON."""

import collections
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("jaxmerge", "jax", "jaxlib", "numpy", "torch")


def describe() -> dict[str, Any]:
    """Processor, cores, load, devices and versions."""
    # Whoever only reads what was described needs no JAX.
    import jax

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "devices": [f"{count} x {kind}" for kind, count in sorted(kinds.items())],
        "versions": versions,
    }


def headline(machine: dict[str, Any]) -> str:
    """One line for people."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load']}; "
        f"{machine['system']}, Python {machine['python']}; "
        f"device {', '.join(machine['devices'])}; {versions}"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
