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
      data: a folder with the images, see `images.load`; None for the packages.
      plots: the folder of the pictures, None for none.
      cache: where the section on quality keeps what it measured pair by pair, None for nowhere.
      sizes: of the assignment problems.
      images: how many images are matched on in the section on speed.
      width: of the first stage of the residual network in the section on speed.
      datasets: of the section on quality, keys of `images.DATASETS`.
      networks: of the section on quality, keys of `networks.NETWORKS`.
      seeds: how many pairs of networks are trained for each.
      runs: how many runs a time is the median of.
      seed: the first seed.
    """

    reference: Path
    data: Path | None
    plots: Path | None
    cache: Path | None
    sizes: tuple[int, ...]
    images: int
    width: int
    datasets: tuple[str, ...]
    networks: tuple[str, ...]
    seeds: int
    runs: int
    seed: int


def verdict(holds: bool, otherwise: str = "") -> str:
    """The cell of the column `report.VERDICT`."""
    return "yes" if holds else f"no: {otherwise}"


def interval(values: np.ndarray, digits: int = 1) -> str:
    """The mean and half the width of Student's 95% interval."""
    return f"{np.mean(values):.{digits}f} ± {half_width(values):.{digits}f}"


def half_width(values: np.ndarray) -> float:
    """Of Student's 95% interval of the mean."""
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(stats.t.ppf(0.975, len(values) - 1) * spread)
