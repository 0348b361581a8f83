"""The exact trimming threshold: our routes beside torch.kthvalue, np.partition and a sort.

    python benchmarks/trimming.py [--elements 16777216] [--runs 5] [--json OUT]

Each case keeps 30% of the entries of one array. The routes of a case run in turn, several times;
the table shows the median milliseconds, and how many times faster than torch.kthvalue that is.
What each route returns differs, in the others' favour: ours finds the threshold and the place
where ties are cut, the others only the threshold.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxmerge.methods.selection import (
    count,
    order,
    select,
    select_compiled,
)

SEED = 0
DENSITY = 0.3
RULER = "torch.kthvalue"
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

Route = Callable[[], object]


def distributions(elements: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(SEED)
    normal = np.abs(rng.standard_normal(elements, dtype=np.float32))
    return {
        "normal": normal,
        "heavy tails": normal**5,
        "80% zeros": normal * (rng.random(elements, dtype=np.float32) < 0.2),
        "few values": np.round(normal * 4) / 4,
        "constant": np.full(elements, 0.5, np.float32),
        "sorted": np.sort(normal),
        "all zero": np.zeros(elements, np.float32),
    }


def routes(values: np.ndarray, k: int, slow: bool) -> dict[str, Route]:
    device = jnp.asarray(values)
    host = np.asarray(device)
    found: dict[str, Route] = {}
    # NumPy and torch order 16-bit floats slowly or not at all: they get the same values wider.
    wide = np.ascontiguousarray(host.astype(np.float32))
    if importlib.util.find_spec("torch"):
        import torch

        tensor = torch.from_numpy(wide)
        found[RULER] = lambda: torch.kthvalue(tensor, tensor.numel() - k + 1)
    found["np.partition"] = lambda: np.partition(wide, wide.size - k)[wide.size - k]
    found["select"] = lambda: jax.block_until_ready(select(device, k))
    for route in ("blocks", "histogram", "bisection"):
        if route != "bisection" or slow:
            found[f"compiled, {route}"] = lambda route=route: jax.block_until_ready(
                select_compiled(device, k, route=route)
            )
    if slow:
        ordering = jax.jit(jnp.sort)
        found["jnp.sort"] = lambda: jax.block_until_ready(ordering(device))
        found["order, once"] = lambda: jax.block_until_ready(order(device))
    return found


def medians(found: dict[str, Route], runs: int) -> dict[str, float]:
    for route in found.values():
        route()
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(runs):
        for name, route in found.items():
            start = time.perf_counter()
            route()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    versions["numpy"] = np.__version__
    if importlib.util.find_spec("torch"):
        import torch

        versions["torch"] = torch.__version__
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0]),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    k = int(count(DENSITY, options.elements))
    report: dict[str, object] = {
        "machine": machine(),
        "seed": SEED,
        "elements": options.elements,
        "kept": k,
        "runs": options.runs,
        "milliseconds": {},
    }
    print(json.dumps({name: report[name] for name in report if name != "milliseconds"}, indent=2))
    cases = [(name, "float32", values) for name, values in distributions(options.elements).items()]
    cases += [
        (name, kind, values) for kind in ("bfloat16", "float16") for name, _, values in cases[:1]
    ]
    for name, kind, values in cases:
        slow = name == "normal" and kind == "float32"
        result = medians(routes(values.astype(TYPES[kind]), k, slow), options.runs)
        report["milliseconds"][f"{name}, {kind}"] = result
        print(f"\n{name}, {kind}")
        for route, milliseconds in result.items():
            ratio = f"{result[RULER] / milliseconds:8.1f} x" if RULER in result else ""
            print(f"  {route:20s} {milliseconds:10.2f} ms {ratio}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
