"""The slots that a search through data flow fills: all layers of all sources in a row, several times over."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmerge.tree import flatten


@dataclass(frozen=True)
class Slots:
    """The row of slots. Slot t holds layer t mod M of the M layers of all sources.

    Attributes:
      sources: how many layers each source has, in the order in which they stand in the row.
      repeats: how many times the row of layers follows itself.

    Example:
      >>> slots = Slots((2, 3), repeats=2)
      >>> slots.depth, slots.count, slots.origin(3)
      (5, 10, (1, 1))
    """

    sources: tuple[int, ...]
    repeats: int

    def __post_init__(self) -> None:
        if not self.sources or min(self.sources) < 1:
            raise ValueError(f"every source has a layer or more, found {self.sources}")
        if self.repeats < 1:
            raise ValueError(f"repeats is 1 or more, found {self.repeats}")

    @property
    def depth(self) -> int:
        """M, the number of layers."""
        return sum(self.sources)

    @property
    def count(self) -> int:
        """T = M * repeats, the number of slots."""
        return self.depth * self.repeats

    def origin(self, layer: int) -> tuple[int, int]:
        """The source of one of the M layers, and its number there."""
        return origin(self.sources, layer)

    def of_source(self, source: int) -> np.ndarray:
        """bool [count]: the slots that run one source as it is, those of its layers in the first round.

        Raises:
          ValueError: there is no such source.

        Example:
          >>> Slots((1, 2), repeats=2).of_source(1).astype(int)
          array([0, 1, 1, 0, 0, 0])
        """
        if not 0 <= source < len(self.sources):
            raise ValueError(f"there are sources 0 to {len(self.sources) - 1}, found {source}")
        first = sum(self.sources[:source])
        slots = np.arange(self.count)
        return (slots >= first) & (slots < first + self.sources[source])


def origin(sources: Sequence[int], layer: int) -> tuple[int, int]:
    """The source that a layer of the row belongs to, and its number there.

    Example:
      >>> origin((2, 3), 2)
      (1, 0)
    """
    ends = list(itertools.accumulate(sources))
    source = next(i for i, end in enumerate(ends) if layer < end)
    return source, layer - (ends[source] - sources[source])


def slots_of(layers: Any, sources: Sequence[int] | None, repeats: int) -> Slots:
    """The row of slots of some layers.

    Args:
      layers: a tree whose leaves have a leading axis of M layers.
      sources: how many of them each source has; None: all belong to one.
      repeats: how many times the row of layers follows itself.

    Raises:
      ValueError: leaves that differ in their leading axis, or sources that do not add up to it.

    Example:
      >>> slots_of({"w": jnp.zeros((3, 2))}, [1, 2], 2)
      Slots(sources=(1, 2), repeats=2)
    """
    leaves, _ = flatten(layers)
    if not leaves:
        raise ValueError("the layers have no arrays")
    (first, one), *_ = leaves.items()
    for path, leaf in leaves.items():
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != jnp.shape(one)[0]:
            raise ValueError(
                f"layers stand on axis 0 of every array: {first!r} has shape {list(jnp.shape(one))}, "
                f"{path!r} has {list(jnp.shape(leaf))}"
            )
    depth = jnp.shape(one)[0]
    counts = (depth,) if sources is None else tuple(sources)
    if sum(counts) != depth:
        raise ValueError(f"sources {counts} have {sum(counts)} layers, but there are {depth}")
    return Slots(counts, repeats)
