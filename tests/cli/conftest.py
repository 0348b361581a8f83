"""Small checkpoints and a way to run commands in this process."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from jaxmerge.cli.app import app
from jaxmerge.converters import save_checkpoint

SHAPES = {"fc.weight": (6, 4), "fc.bias": (6,), "head.weight": (3, 6)}

TIES = """\
merge_method: ties
base_model: base
models:
- {model: a, parameters: {weight: 0.5}}
- {model: b, parameters: {weight: 0.75}}
parameters: {density: 0.5}
"""

Call = Callable[..., Result]


def tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return {**drawn, "steps": np.array([2**40 + seed], np.int64)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the checkpoints base, a and b, and the recipe ties.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for seed, name in enumerate(("base", "a", "b")):
        save_checkpoint(name, tensors(seed))
    Path("ties.yaml").write_text(TIES)
    return tmp_path


@pytest.fixture
def call() -> Call:
    """Runs `jaxmerge ARGUMENTS`."""

    def run(*arguments: object) -> Result:
        # Exceptions that escape are bugs: they would be tracebacks.
        return CliRunner().invoke(
            app, [os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments]
        )

    return run
