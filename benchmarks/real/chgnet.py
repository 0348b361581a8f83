"""CHGNet's published weights: PyTorch pickles of a model, its optimiser and its training history.

Weights: the package chgnet 0.4.2.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packages import package
from report import Table

from jaxmerge.converters import load_checkpoint, open_checkpoint, save_checkpoint
from real import Options, verdict


def run(options: Options) -> Iterator[Table]:
    """Each pickle to safetensors and back into its own structure."""
    table = Table(
        "CHGNet 0.4.2: from PyTorch pickles to safetensors and back",
        {
            "weights": "",
            "state dict at": "",
            "tensors": "d",
            "values": "d",
            "equal bit for bit": "d",
            "rest of the file": "",
            "holds": "",
        },
        [
            "The tensors are read through a safetensors file and written into the structure of the pickle;",
            "the rest are its other tensors, numbers and texts.",
        ],
    )
    table.start()
    pretrained = package("chgnet", "0.4.2") / "chgnet" / "pretrained"
    for source in sorted(pretrained.glob("*/*.pth.tar")):
        table.add(**_returned(source, options.scratch))
    yield table


def _returned(source: Path, scratch: Path) -> dict[str, Any]:
    with open_checkpoint(source) as checkpoint:
        key = checkpoint.key
    flat, target = scratch / "flat.safetensors", scratch / "returned.pth.tar"
    save_checkpoint(flat, load_checkpoint(source))
    save_checkpoint(target, load_checkpoint(flat), template=(source, key))
    before, after = (
        torch.load(path, weights_only=True, map_location="cpu") for path in (source, target)
    )
    old, new = (_at(structure, key) for structure in (before, after))
    tensors = {name: value for name, value in old.items() if isinstance(value, torch.Tensor)}
    equal = sum(_same(value, new.get(name)) for name, value in tensors.items())
    rest = _same(before, after)
    return {
        "weights": source.parent.name,
        "state dict at": key or "the top level",
        "tensors": len(tensors),
        "values": sum(tensor.numel() for tensor in tensors.values()),
        "equal bit for bit": equal,
        "rest of the file": "equal" if rest else "differs",
        "holds": verdict(equal == len(tensors) and rest, "not as it was"),
    }


def _at(structure: Any, key: str | None) -> Any:
    for part in key.split(".") if key else ():
        structure = structure[part]
    return structure


def _same(first: Any, second: Any) -> bool:
    """Whether two structures of containers, tensors and plain values are equal, bit for bit, in order."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        one, two = (np.atleast_1d(value.detach().numpy()) for value in (first, second))
        return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
    if isinstance(first, Mapping):
        return list(first) == list(second) and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    # NaN among the training's figures is equal to itself here.
    return bool(first == second or (first != first and second != second))
