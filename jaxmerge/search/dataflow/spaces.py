"""The mixed space of a data flow: which slots are on, and the scales, which count only where they are used."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.search.dataflow.program import neighbours
from jaxmerge.search.dataflow.scales import FORMS, HIDDEN, Form
from jaxmerge.search.dataflow.slots import Slots
from jaxmerge.search.space import Space, space
from jaxmerge.search.variables import binary, continuous, when
from jaxmerge.tree import nearest

WEIGHTS = 3.0
"""The network's weights lie between its negative and it."""


@dataclass(frozen=True)
class PairSpace(Space):
    """A space whose scales of pairs of layers are active where the one layer follows the other.

    That is no condition on single variables: which slot comes next depends on all that lie between.

    Attributes:
      depth: M, the number of layers.
    """

    depth: int

    def active(self, genome: jax.Array) -> jax.Array:
        """bool [size]; see `Space.active`."""
        used = neighbours(self.decode(genome)["on"], self.depth).ravel()
        first = super().active(genome)[: self.size - self.depth**2]
        return jnp.concatenate([first, used])


def flow_space(
    slots: Slots,
    form: Form = "slots",
    *,
    bounds: tuple[float, float] = (0.5, 2.0),
    probability: Any = 0.5,
    conditional: bool = True,
) -> Space:
    """The space of a data flow: {"on": bool [T], "scale": ...}, as `scale_function` reads it.

    Args:
      slots: the row of slots.
      form: of the scales. "slots": a scale counts where its slot is on. "pairs": where its layers follow each other.
        "network": its weights always count. "none": there are none.
      bounds: of the scales, on a log scale; 1 lies between them, and is the value of what does not count.
      probability: of a slot to be on, where a search starts: a number, or one for each slot.
      conditional: whether the space knows what counts; False: all variables always do. The function that is searched is
        the same.

    Returns:
      The space.

    Raises:
      ValueError: an unknown form, or bounds that are not around 1.

    Example:
      >>> found = flow_space(Slots((1, 1), repeats=2))
      >>> point = {"on": jnp.array([True, False, False, True]), "scale": jnp.ones(4)}
      >>> found.active(found.encode(point)).astype(int)
      Array([1, 1, 1, 1, 1, 0, 0, 1], dtype=int32)
    """
    if form not in FORMS:
        raise ValueError(
            f"unknown form of scales {form!r}{nearest(str(form), FORMS)}; there are {', '.join(FORMS)}"
        )
    low, high = bounds
    if not 0 < low < 1 < high:
        raise ValueError(f"bounds of scales lie above 0, on both sides of 1; found {bounds}")
    tree: dict[str, Any] = {"on": binary((slots.count,), probability)}

    def scale(shape: tuple[int, ...], conditions: Any = None) -> Any:
        return continuous(low, high, shape=shape, scale="log", initial=1.0, when=conditions)

    if form == "slots":
        tree["scale"] = scale((slots.count,), when("on") if conditional else None)
    elif form == "pairs":
        tree["scale"] = scale((slots.depth, slots.depth))
    elif form == "network":
        shapes = {"kernel": (3, HIDDEN), "bias": (HIDDEN,), "out": (HIDDEN,)}
        tree["scale"] = {
            name: continuous(-WEIGHTS, WEIGHTS, shape=shape, initial=0.0)
            for name, shape in shapes.items()
        }
    found = space(tree)
    if form == "pairs" and conditional:
        return PairSpace(found.variables, found.definition, slots.depth)
    return found
