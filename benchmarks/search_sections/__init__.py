"""The sections of search.py: each takes `Options` and gives its tables one by one."""

import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """What all sections are told.

    Attributes:
      dimensions: how many scalar variables the functions have, in the section on strategies.
      seeds: how many runs of each.
      evaluations: how many a run may take.
      seed: the first seed.
      scratch: a folder for what is written on the way.
      mergekit: the executable `mergekit-yaml`, beside its Python; None without.
    """

    dimensions: tuple[int, ...]
    seeds: int
    evaluations: int
    seed: int
    scratch: Path
    mergekit: str | None


def peer(name: str) -> Any:
    """A package that only benchmarks need."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise SystemExit(f"this section runs beside {package}: pip install {package}") from error


def versioned(package: str) -> str:
    """A package's name and version."""
    return f"{package} {importlib.metadata.version(package)}"


def verdict(holds: bool, otherwise: str = "") -> str:
    """The cell of the column `report.VERDICT`."""
    return "yes" if holds else f"no: {otherwise}"
