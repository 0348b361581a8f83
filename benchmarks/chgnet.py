"""Merges a real pair of PyTorch checkpoints by every operator, from recipes, and reports what changed.

The pair is CHGNet 0.3.0 and its r2scan fine-tune, from the package `chgnet` 0.4.2. Each merge is written as safetensors
and as a PyTorch file in the structure of the source; torch loads both back; names, shapes and dtypes must be equal.

    python benchmarks/chgnet.py [--data DIR] [--json OUT]
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from packages import package
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
        "changed": float(np.mean(merged != base)),
        "moved": norm / float(np.linalg.norm(delta)),
        "cosine": float(moved @ delta) / max(norm * float(np.linalg.norm(delta)), 1e-30),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="unpacked files of chgnet 0.4.2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    paths = checkpoints(arguments.data or package("chgnet", "0.4.2"))
    print(
        f"chgnet 0.4.2: {BASE} (base) and {TUNED}; jax {jax.__version__}, torch {torch.__version__}"
    )
    print(f"{platform.platform()}, {platform.machine()}; each method at its defaults, seed 0\n")
    print(
        f"{'method':<18}{'seconds':>8}{'entries changed':>17}{'|moved|/|delta|':>17}{'cosine':>8}"
    )
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in jm.methods.names():
            row = merge(name, paths, Path(scratch))
            rows.append(row)
            print(
                f"{name:<18}{row['seconds']:>8.2f}{row['changed']:>16.1%} {row['moved']:>17.3f}"
                f"{row['cosine']:>8.3f}"
            )
    print(
        f"\n{rows[0]['tensors']} tensors; names, shapes and dtypes as in the source, in both formats"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
