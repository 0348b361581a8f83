"""Sites: where a program contracts a parameter with its activations, and what a visitor may do there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax


@dataclass(frozen=True)
class Site:
    """A linear contraction of a parameter leaf with an activation; all of it is static.

    Attributes:
      path: the leaf's path.
      inputs: the axes of the leaf (of one layer of it) that are contracted, ascending.
      outputs: its other axes, ascending.
      shape: the shape of the leaf (of one layer of it).
      layers: how many layers the leaf holds along its axis 0 where the program takes them one by one, else None.
      whole: False where the contraction takes only a slice of an output axis.
      repeated: True inside a loop that does not take the leaf apart: a replacement lasts for one turn only.
    """

    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shape: tuple[int, ...]
    layers: int | None
    whole: bool
    repeated: bool


class Use(NamedTuple):
    """The arrays at a site.

    Attributes:
      parameter: the leaf (one layer of it), in its own layout.
      inputs: [n, in], the activation: one row per example and position; the columns run over `Site.inputs`, the last
        of them fastest. A convolution's rows are its patches.
      layer: which layer it is: int, int32 [], or None where `Site.layers` is.
      replaced: whether a visitor has replaced the leaf (or this layer) before.
      rows: brings the contraction's output to [n, out], columns over `Site.outputs`.
    """

    parameter: jax.Array
    inputs: jax.Array
    layer: int | jax.Array | None
    replaced: bool
    rows: Callable[[jax.Array], jax.Array]


class Visit(NamedTuple):
    """What a visitor answers.

    Attributes:
      record: a pytree of arrays to keep, or None.
      parameter: what the leaf (this layer of it) is from here on, or None to leave it.
      output: a function to put on the contraction's output, or None.
    """

    record: Any = None
    parameter: jax.Array | None = None
    output: Callable[[jax.Array], jax.Array] | None = None


Visitor = Callable[[Site, Use], Visit]


class Record(NamedTuple):
    """What a visitor kept at one site.

    Attributes:
      site: where.
      layer: int, or int32 with one axis per enclosing loop, or None where `Site.layers` is.
      value: the visitor's record; each enclosing loop adds a leading axis.
    """

    site: Site
    layer: int | jax.Array | None
    value: Any
