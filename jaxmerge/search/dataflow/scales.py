"""What multiplies the hidden states between two layers: one factor per slot, per pair of neighbours, or a network."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxmerge.search.dataflow.program import Scale
from jaxmerge.search.dataflow.slots import Slots

Form = Literal["slots", "pairs", "network", "none"]

FORMS: tuple[Form, ...] = get_args(Form)

HIDDEN = 8
"""Units of the network."""


def scale_function(
    form: Form, slots: Slots, values: Any, bounds: tuple[float, float]
) -> Scale | None:
    r"""The factor that a data flow multiplies a layer's input by, as `run` calls it.

    With i the layer that ran before, j the current one and t its slot:

    - "slots": :math:`x_t`;
    - "pairs": :math:`W_{ij}`, the same in every round; 1 before the first layer;
    - "network": :math:`\exp` of a network of (i / M, j / M, t / T) with one hidden layer, its result squashed between
      the logarithms of the bounds; 1 before the first layer;
    - "none": 1.

    Args:
      form: see above.
      slots: the row of slots.
      values: "slots": [T]; "pairs": [M, M]; "network": {"kernel": [3, units], "bias": [units], "out": [units]};
        "none": not read.
      bounds: of the network's factors, around 1.

    Returns:
      The function; None for "none".

    Example:
      >>> function = scale_function("pairs", Slots((2,), 1), jnp.array([[1.0, 2.0], [3.0, 4.0]]), (0.5, 2.0))
      >>> float(function(jnp.asarray(1), jnp.asarray(0), jnp.asarray(0)))
      3.0
    """
    if form == "none":
        return None
    values = jax.tree.map(jnp.asarray, values)
    if form == "slots":
        return lambda previous, current, slot: values[slot]
    one = jnp.ones((), jnp.float32)
    if form == "pairs":
        return lambda previous, current, slot: jnp.where(
            previous < 0, one, values[jnp.maximum(previous, 0), current]
        )
    low, high = (jnp.log(jnp.asarray(bound, jnp.float32)) for bound in bounds)

    def network(previous: jax.Array, current: jax.Array, slot: jax.Array) -> jax.Array:
        places = jnp.stack([previous / slots.depth, current / slots.depth, slot / slots.count])
        hidden = jnp.tanh(places.astype(jnp.float32) @ values["kernel"] + values["bias"])
        out = jnp.tanh(hidden @ values["out"])
        return jnp.where(previous < 0, one, jnp.exp(out * jnp.where(out < 0, -low, high)))

    return network


def factors(scale: Scale | None, slots: Slots, on: jax.Array) -> jax.Array:
    """The factor that each slot multiplies by under an inclusion, float32 [T]; 1 in slots that are off.

    Example:
      >>> slots = Slots((2,), 1)
      >>> matrix = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> scale = scale_function("pairs", slots, matrix, (0.5, 2.0))
      >>> factors(scale, slots, jnp.array([True, True]))
      Array([1., 2.], dtype=float32)
    """
    if scale is None:
        return jnp.ones(slots.count, jnp.float32)

    def one(previous: jax.Array, slot: tuple[jax.Array, jax.Array]) -> Any:
        at, is_on = slot
        current = at % slots.depth
        factor = jnp.where(is_on, scale(previous, current, at), 1.0)
        return jnp.where(is_on, current, previous), factor

    places = jnp.arange(slots.count, dtype=jnp.int32)
    _, found = jax.lax.scan(one, jnp.asarray(-1, jnp.int32), (places, jnp.asarray(on, bool)))
    return found.astype(jnp.float32)
