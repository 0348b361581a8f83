"""Models fused by averaging, along a training run and across runs, and the losses on the way between them."""

from jaxmerge.fusion.averages import ema, lawa, swa, uniform_soup
from jaxmerge.fusion.paths import barrier, line, path_losses, plane_losses
from jaxmerge.fusion.soups import GreedySoupInfo, GreedySoupState, greedy_soup, soup_greedily
from jaxmerge.fusion.streaming import AverageState, StreamingAverage

__all__ = [
    "AverageState",
    "GreedySoupInfo",
    "GreedySoupState",
    "StreamingAverage",
    "barrier",
    "ema",
    "greedy_soup",
    "lawa",
    "line",
    "path_losses",
    "plane_losses",
    "soup_greedily",
    "swa",
    "uniform_soup",
]
