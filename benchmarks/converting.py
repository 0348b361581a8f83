"""Converts a checkpoint between formats, beside a copy of the same file.

    python benchmarks/converting.py [--parameters 1.1e9] [--runs 3] [--scratch DIR] [--json OUT]

The checkpoint has the shapes of a 22-layer decoder. Every route runs in a process of its own, which tells its largest
resident memory; routes take turns, so that what else the machine does falls on all of them.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, headline
from report import Report, Table

from jaxmerge.converters import CheckpointWriter, TensorInfo

MOST_TIMES, MOST_MEMORY = 2.0, 1.5e9
LAYERS = 22
# name -> (where from, where to, options)
ROUTES = {
    "copy": ("model.safetensors", "copy.safetensors", {}),
    "safetensors, one file": ("model.safetensors", "one.safetensors", {}),
    "safetensors, shards of 500 MB": ("model.safetensors", "shards", {"shard_size": 500_000_000}),
    "safetensors, bfloat16 to float32": ("model.safetensors", "wide", {"dtype": "float32"}),
    "safetensors to PyTorch": ("model.safetensors", "model.pt", {}),
    "PyTorch to safetensors": ("model.pt", "back.safetensors", {}),
}
KEPT = ("model.safetensors", "model.pt")

CHILD = """
import json, resource, sys, time
source, target, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if options is None:
    import os, shutil

    began = time.perf_counter()
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
else:
    from jaxmerge.converters import convert

    if ".pt" in source:
        import torch

    began = time.perf_counter()
    convert(source, target, **options)
seconds = time.perf_counter() - began
memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    # A process begins with its parent's largest size; Linux keeps this one's own too.
    with open("/proc/self/status") as status:
        lines = [line for line in status if line.startswith("VmHWM:")]
    memory = 1024 * int(lines[0].split()[1])
except (OSError, IndexError):
    pass
print(json.dumps([seconds, memory]))
"""


def shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """A decoder of about so many parameters: width d, 32,000 tokens, feed-forward 2.75 d."""
    width = 64
    while _count(width + 64) <= parameters:
        width += 64
    inner = width * 11 // 4
    found = {"model.embed_tokens.weight": (32_000, width), "lm_head.weight": (32_000, width)}
    for layer in range(LAYERS):
        for name, shape in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width // 8, width),
            "self_attn.v_proj": (width // 8, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
        }.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return found


def _count(width: int) -> float:
    return 2 * 32_000 * width + LAYERS * (2.25 + 3 * 2.75) * width * width


def write(path: Path, parameters: float) -> int:
    """Writes the checkpoint in bfloat16, tensor by tensor; returns how many parameters it has."""
    infos = [TensorInfo.of(name, shape, "bfloat16") for name, shape in shapes(parameters).items()]
    rng = np.random.default_rng(0)
    with CheckpointWriter(path, infos, metadata={"format": "pt"}) as writer:
        for info in infos:
            # The upper halves of float32 normals.
            bits = rng.standard_normal(info.shape, np.float32).view(np.uint32) >> 16
            writer.write(info.name, bits.astype(np.uint16).view("bfloat16"))
    return sum(info.nbytes for info in infos) // 2


def once(scratch: Path, route: str) -> tuple[float, float]:
    """Seconds and bytes of resident memory of one route in a process of its own."""
    source, target, options = ROUTES[route]
    remove(scratch / target)
    # What other routes left to be written is not this one's.
    os.sync()
    given = json.dumps(None if route == "copy" else options)
    command = [sys.executable, "-c", CHILD, str(scratch / source), str(scratch / target), given]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    if target not in KEPT:
        remove(scratch / target)
    seconds, memory = json.loads(done.stdout)
    return seconds, memory


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cell(values: list[float], unit: float = 1.0) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value / unit:.4g}") for name, value in found.items()}


def measure(scratch: Path, runs: int, table: Table) -> None:
    found: dict[str, list[tuple[float, float]]] = {route: [] for route in ROUTES}
    for _ in range(runs):
        for route in ROUTES:
            found[route].append(once(scratch, route))
    copy = statistics.median(seconds for seconds, _ in found["copy"])
    for route, values in found.items():
        seconds, memory = ([value[i] for value in values] for i in range(2))
        row: dict[str, Any] = {"route": route, "s": cell(seconds), "memory GB": cell(memory, 1e9)}
        if route != "copy":
            times = statistics.median(seconds) / copy
            row |= {"of a copy": times}
            # Twice the bytes are no longer that file's copy.
            limited = "dtype" not in ROUTES[route][2]
            too_slow = limited and times > MOST_TIMES
            too_large = max(memory) > MOST_MEMORY
            row["holds"] = "no: too slow" if too_slow else "no: too large" if too_large else "yes"
        table.add(**row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1.1e9)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = Report("converting", __doc__.splitlines()[0], describe(), 0)
    print(f"{headline(report.machine)}; seed 0")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        count = write(scratch / "model.safetensors", arguments.parameters)
        table = Table(
            f"{count / 1e9:.2f} billion parameters in bfloat16, {2 * count / 1e9:.1f} GB",
            {"route": "", "s": ".2f", "of a copy": ".2f", "memory GB": ".2f", "holds": ""},
            [
                "The copy is shutil.copyfile and fsync: conversions too wait for the disk. Imports are not",
                "timed. Memory is the largest resident size of the process, torch in it where it reads the file.",
                f"Limits: {MOST_TIMES:g} times the copy (not where other bytes are written), {MOST_MEMORY / 1e9:g} GB.",
            ],
        )
        table.start()
        report.tables.append(table)
        measure(scratch, arguments.runs, table)
    report.write(arguments.json)


if __name__ == "__main__":
    main()
