"""One module for each published model that real_weights.py loads: `run(options)` gives its tables."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What all models are told.

    Attributes:
      scratch: an empty folder for what they write.
      seed: of random inputs.
      runs: how many runs a time is the median of.
    """

    scratch: Path
    seed: int
    runs: int


def verdict(holds: bool, otherwise: str = "") -> str:
    """The cell of the column `report.VERDICT`."""
    return "yes" if holds else f"no: {otherwise}"
