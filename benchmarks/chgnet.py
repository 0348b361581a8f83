"""Merges a real pair of PyTorch checkpoints by every operator, from recipes, and reports what changed.

The pair is CHGNet 0.3.0 and its r2scan fine-tune, from the package `chgnet` 0.4.2. Each merge is written as safetensors
and as a PyTorch file in the structure of the source; torch loads both back; names, shapes and dtypes must be equal.

    python benchmarks/chgnet.py [--data DIR] [--json OUT]
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe, headline
from packages import package
from report import Report, Table
from safetensors.torch import load_file

import jaxmerge as jm
from jaxmerge.recipes import make_plan, parse, run

BASE, TUNED = "0.3.0", "r2scan"


def checkpoints(data: Path) -> dict[str, Path]:
    """The two files by name."""
    found = {}
    for name in (BASE, TUNED):
        files = sorted((data / "chgnet" / "pretrained" / name).glob("*.pth.tar"))
        if len(files) != 1:
            raise SystemExit(f"one *.pth.tar expected in chgnet/pretrained/{name} below {data}")
        found[name] = files[0]
    return found


def recipe(name: str, paths: dict[str, Path]) -> str:
    """A method at its defaults: the fine-tune beside its base, or both as models, or the fine-tune alone."""
    method = jm.methods.get(name)()
    most = method.models[1]
    with_base = method.base == "required" or (method.base == "source" and most != 1)
    models = [paths[TUNED]] if with_base or most == 1 else [paths[BASE], paths[TUNED]]
    listed = "".join(f"  - model: {path}\n" for path in models)
    base = f"base_model: {paths[BASE]}\n" if with_base else ""
    return f"dialect: jaxmerge\nmerge_method: {name}\nmodels:\n{listed}{base}"


def merge(name: str, paths: dict[str, Path], scratch: Path) -> dict[str, Any]:
    """Merges twice, reloads with torch, and compares with the sources."""
    text = recipe(name, paths)
    started = time.perf_counter()
    run(make_plan(parse(text), out=scratch / f"{name}.safetensors"))
    seconds = time.perf_counter() - started
    run(make_plan(parse(text), out=scratch / f"{name}.pth.tar"))
    source = torch.load(paths[BASE], weights_only=True, map_location="cpu")
    tuned = torch.load(paths[TUNED], weights_only=True, map_location="cpu")["model"]["state_dict"]
    written = torch.load(scratch / f"{name}.pth.tar", weights_only=True, map_location="cpu")
    assert written.keys() == source.keys(), "the file has another structure"
    before, after = source["model"]["state_dict"], written["model"]["state_dict"]
    flat = load_file(scratch / f"{name}.safetensors")
    assert list(before) == list(after), "names or their order differ"
    assert set(before) == set(flat), "names differ"
    for key, tensor in before.items():
        for other in (after[key], flat[key]):
            assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype), key
        assert torch.equal(after[key], flat[key]), key
        assert bool(torch.isfinite(after[key]).all()), key
    vector = [
        np.concatenate([t[k].numpy().ravel() for k in before]) for t in (before, tuned, after)
    ]
    base, fine, merged = (v.astype(np.float64) for v in vector)
    delta, moved = fine - base, merged - base
    norm = float(np.linalg.norm(moved))
    return {
        "method": name,
        "seconds": round(seconds, 3),
        "tensors": len(before),
        "entries changed": float(np.mean(merged != base)),
        "moved/delta": norm / float(np.linalg.norm(delta)),
        "cosine": float(moved @ delta) / max(norm * float(np.linalg.norm(delta)), 1e-30),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="unpacked files of chgnet 0.4.2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    paths = checkpoints(arguments.data or package("chgnet", "0.4.2"))
    summary = __doc__.splitlines()[0]
    report = Report("chgnet", summary, describe(), 0)
    print(f"{headline(report.machine)}; seed 0")
    table = Table(
        f"chgnet 0.4.2: {BASE} (base) and {TUNED}",
        {
            "method": "",
            "seconds": ".2f",
            "tensors": "d",
            "entries changed": ".1%",
            "moved/delta": ".3f",
            "cosine": ".3f",
        },
        [
            "Each method at its defaults; seconds of the first run, reading and writing included.",
            "Names, shapes and dtypes are as in the source, in both formats. moved/delta: how far the merge",
            "lies from the base, over how far the fine-tune does; cosine: between the two directions.",
            "Methods that need more than models are left out.",
        ],
    )
    table.start()
    report.tables.append(table)
    with tempfile.TemporaryDirectory() as scratch:
        for name in jm.methods.names():
            # A recipe gives no Fisher information and no Gram matrices.
            if any(extra.required for extra in jm.methods.get(name)().extras.values()):
                continue
            table.add(**merge(name, paths, Path(scratch)))
    report.write(arguments.json)


if __name__ == "__main__":
    main()
