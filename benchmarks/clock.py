"""Times of several routes that run in turn, so that what else the machine does falls on all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Times:
    """Seconds of several runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def milliseconds(self) -> dict[str, float]:
        return self._cell([1e3 * value for value in self.seconds])

    def in_seconds(self) -> dict[str, float]:
        return self._cell(list(self.seconds))

    def rate(self, size: int) -> dict[str, float]:
        """Bytes in GB/s."""
        return self._cell([1e-9 * size / value for value in self.seconds])

    def _cell(self, values: list[float]) -> dict[str, float]:
        found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        return {name: float(f"{value:.4g}") for name, value in found.items()}


def in_turn(routes: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, Times]:
    """Calls every route once to compile and warm up, then all of them in turn, `runs` times."""
    for route in routes.values():
        jax.block_until_ready(route())
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(runs):
        for name, route in routes.items():
            seconds[name].append(once(route))
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def once(route: Callable[[], Any]) -> float:
    """Seconds of one call; what it returns is let go after the clock stops."""
    started = time.perf_counter()
    result = jax.block_until_ready(route())
    stopped = time.perf_counter()
    del result
    return stopped - started
