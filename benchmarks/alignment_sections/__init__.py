"""The sections of alignment.py: each takes `Options` and gives its tables one by one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Options:
    """What all sections are told.

    Attributes:
      reference: the folder of the reference problems.
      data: the folder of Fashion-MNIST's four IDX files.
      plot: where the plot of accuracy over alpha goes, None for nowhere.
      sizes: of the assignment problems.
      images: how many images are matched on in the section on speed.
      width: of the first stage of the residual network in the section on speed.
      network: a name that `networks.network` knows, for the section on quality.
      seeds: how many pairs of networks are trained.
      epochs: of training each.
      examples: images that each is trained on.
      runs: how many runs a time is the median of.
      seed: the first seed.
    """

    reference: Path
    data: Path
    plot: Path | None
    sizes: tuple[int, ...]
    images: int
    width: int
    network: str
    seeds: int
    epochs: int
    examples: int
    runs: int
    seed: int


def verdict(holds: bool, otherwise: str = "") -> str:
    """The cell of the column `report.VERDICT`."""
    return "yes" if holds else f"no: {otherwise}"


def interval(values: np.ndarray) -> str:
    """The mean and half the width of Student's 95% interval, of percentages."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.1f} ± {half:.1f}"
