"""What a benchmark ran on: printed above every table and kept in its JSON."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jaxmerge", "jax", "jaxlib", "numpy", "torch")


def describe() -> dict[str, Any]:
    """Processor, cores, load, devices and versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "devices": [str(device) for device in jax.devices()],
        "versions": versions,
    }


def headline(machine: dict[str, Any]) -> str:
    """One line for people."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load']}; "
        f"{machine['system']}, Python {machine['python']}; {', '.join(machine['devices'])}; {versions}"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
