"""Checkpoints, and recipes that merge them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import pytest

from jaxmerge.converters import save_checkpoint
from jaxmerge.recipes import Plan, make_plan, parse

Tensors = dict[str, np.ndarray]

# Alike ones are grouped, the wide one is cut, and what is not floating point is carried over.
SHAPES: Mapping[str, tuple[tuple[int, ...], Any]] = {
    **{f"layers.{i}.w": ((6, 5), np.float32) for i in range(9)},
    "wide": ((40, 30), ml_dtypes.bfloat16),
    "norm": ((7,), np.float16),
    "scalar": ((), np.float32),
}


def tensors(seed: int, shapes: Mapping[str, tuple[tuple[int, ...], Any]]) -> Tensors:
    rng = np.random.default_rng(seed)
    drawn = {
        name: np.asarray(rng.normal(size=shape)).astype(dtype)
        for name, (shape, dtype) in shapes.items()
    }
    return {**drawn, "steps": np.array([seed, 3]), "none": np.zeros((0, 2), np.float32)}


def save(folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], Any]] = SHAPES) -> None:
    """Writes a base and two models near it."""
    base = tensors(0, shapes)
    save_checkpoint(folder / "base", base)
    for seed, name in enumerate(("a", "b"), 1):
        other = tensors(seed, shapes)
        save_checkpoint(
            folder / name,
            {
                key: (array + other[key] / 4).astype(array.dtype) if key in shapes else other[key]
                for key, array in base.items()
            },
        )


class Planned(Protocol):
    def __call__(self, method: str, parameters: Any = None, **arguments: Any) -> Plan: ...


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """Plans a merge of the checkpoints in an empty folder, which stand there if they were not written otherwise."""
    monkeypatch.chdir(tmp_path)

    def plan(
        method: str,
        parameters: Any = None,
        *,
        models: tuple[str, ...] = ("a", "b"),
        base: bool = True,
        options: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Plan:
        if not Path("base").exists():
            save(tmp_path)
        recipe = {
            "dialect": "jaxmerge",
            "merge_method": method,
            "models": [{"model": name} for name in models],
            "parameters": parameters or {},
            **({"options": dict(options)} if options else {}),
            **({"base_model": "base"} if base else {}),
        }
        return make_plan(parse(json.dumps(recipe)), seed=3, **arguments)

    return plan


@pytest.fixture
def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts, groups, samples and bins as large tensors would be."""
    from jaxmerge.methods.selection import stream
    from jaxmerge.recipes.streaming import cuts, grouping

    monkeypatch.setattr(cuts, "LARGEST", 256)
    monkeypatch.setattr(grouping, "SMALL", 100)
    monkeypatch.setattr(grouping, "_WINDOW", 1500)
    monkeypatch.setattr(stream, "_SAMPLES", (64, 256))
    monkeypatch.setattr(stream, "_HELD", 50)
