"""The mixed space of a data flow: what counts where."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.search.dataflow.scales import HIDDEN
from jaxmerge.search.dataflow.searching import around
from jaxmerge.search.dataflow.slots import Slots
from jaxmerge.search.dataflow.spaces import flow_space

SLOTS = Slots((2, 1), repeats=2)
ON = np.array([True, False, True, True, False, False])


def point(form: str) -> dict[str, Any]:
    shape = {"slots": (6,), "pairs": (3, 3)}[form]
    return {"on": ON, "scale": np.full(shape, 1.5)}


def test_a_slots_scale_counts_where_it_is_on() -> None:
    space = flow_space(SLOTS, "slots")
    active = space.active(space.encode(point("slots")))
    np.testing.assert_array_equal(active, [*[True] * 6, *ON])
    decoded = space.decode(space.encode(point("slots")))
    np.testing.assert_allclose(decoded["scale"], np.where(ON, 1.5, 1.0), rtol=1e-5)


def test_a_pairs_scale_counts_where_its_layers_follow_each_other() -> None:
    space = flow_space(SLOTS, "pairs")
    active = np.asarray(jax.jit(space.active)(space.encode(point("pairs"))))
    assert active[:6].all()
    # Layers 0, 2, 0.
    wanted = np.zeros((3, 3), bool)
    wanted[0, 2] = wanted[2, 0] = True
    np.testing.assert_array_equal(active[6:].reshape(3, 3), wanted)


@pytest.mark.parametrize("form", ["slots", "pairs"])
def test_a_space_without_conditions_says_that_all_counts(form: Any) -> None:
    space = flow_space(SLOTS, form, conditional=False)
    assert bool(jnp.all(space.active(space.encode(point(form)))))
    told = flow_space(SLOTS, form)
    assert told != space
    assert told == flow_space(SLOTS, form)
    assert hash(told) == hash(flow_space(SLOTS, form))


def test_sizes() -> None:
    assert flow_space(SLOTS, "none").size == 6
    assert flow_space(SLOTS, "slots").size == 12
    assert flow_space(SLOTS, "pairs").size == 6 + 9
    assert flow_space(SLOTS, "network").size == 6 + 5 * HIDDEN


def test_a_search_may_start_from_one_source() -> None:
    space = flow_space(SLOTS, "slots", probability=around(SLOTS, 0, 0.1))
    genome = space.initial_genome()
    np.testing.assert_allclose(genome[:6], [0.9, 0.9, 0.1, 0.1, 0.1, 0.1], rtol=1e-6)
    decoded = space.decode(genome)
    np.testing.assert_array_equal(decoded["on"], [True, True, False, False, False, False])
    np.testing.assert_allclose(decoded["scale"], 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="sources 0 to 1, found 2"):
        around(SLOTS, 2, 0.1)


def test_forms_and_bounds_that_are_none_are_refused() -> None:
    form: Any = "pair"
    with pytest.raises(ValueError, match="unknown form of scales 'pair'; did you mean 'pairs'"):
        flow_space(SLOTS, form)
    for bounds in ((0.0, 2.0), (1.0, 2.0), (0.5, 1.0), (2.0, 0.5)):
        with pytest.raises(ValueError, match="on both sides of 1"):
            flow_space(SLOTS, bounds=bounds)
