"""Models fused by averaging: along a training run, and across runs."""

from jaxmerge.fusion.averages import ema, lawa, swa, uniform_soup
from jaxmerge.fusion.soups import GreedySoupInfo, GreedySoupState, greedy_soup, soup_greedily
from jaxmerge.fusion.streaming import AverageState, StreamingAverage

__all__ = [
    "AverageState",
    "GreedySoupInfo",
    "GreedySoupState",
    "StreamingAverage",
    "ema",
    "greedy_soup",
    "lawa",
    "soup_greedily",
    "swa",
    "uniform_soup",
]
