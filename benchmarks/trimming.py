"""The exact trimming threshold: our routes beside torch.kthvalue, np.partition and a sort.

    python benchmarks/trimming.py [--elements 16777216] [--runs 5] [--json OUT]

Each case keeps 30% of the entries of one array. The routes of a case run in turn, several times;
the table shows the median milliseconds, and how many times faster than torch.kthvalue that is.
What each route returns differs, in the others' favour: ours finds the threshold and the place
where ties are cut, the others only the threshold.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from clock import in_turn
from machine import describe, headline
from report import Report, Table

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
    found["select"] = lambda: select(device, k)
    for route in ("blocks", "histogram", "bisection"):
        if route != "bisection" or slow:
            found[f"compiled, {route}"] = lambda route=route: select_compiled(
                device, k, route=route
            )
    if slow:
        ordering = jax.jit(jnp.sort)
        found["jnp.sort"] = lambda: ordering(device)
        found["order, once"] = lambda: order(device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    k = int(count(DENSITY, options.elements))
    report = Report("trimming", __doc__.splitlines()[0], describe(), SEED)
    print(f"{headline(report.machine)}; seed {SEED}")
    cases = [(name, "float32", values) for name, values in distributions(options.elements).items()]
    cases += [
        (name, kind, values) for kind in ("bfloat16", "float16") for name, _, values in cases[:1]
    ]
    for name, kind, values in cases:
        slow = name == "normal" and kind == "float32"
        times = in_turn(routes(values.astype(TYPES[kind]), k, slow), options.runs)
        table = Table(
            f"{name}, {kind}",
            {"route": "", "ms": ".2f", "times faster than the ruler": ".1f"},
            [f"{k} of {options.elements} entries are kept; the ruler is {RULER}."],
        )
        table.start()
        report.tables.append(table)
        for route, found in times.items():
            ratio = times[RULER].median / found.median if RULER in times else None
            cells = {"ms": found.milliseconds(), "times faster than the ruler": ratio}
            table.add(route=route, **cells)
    report.write(options.json)


if __name__ == "__main__":
    main()
