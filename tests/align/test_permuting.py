"""Permutations of a spec as a group, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.align import PermutationSpec

AXES = {
    "value": (None, ("head", "dim")),
    "out": (("head", "dim"), "stream"),
    "experts": ("expert", "stream", "hidden"),
    "fused": ([("head", "dim"), (2, "stream")],),
}
SIZES = {"head": 2, "dim": 3, "stream": 5, "expert": 2, "hidden": 4}
SPEC = PermutationSpec.from_axes(AXES, sizes=SIZES, parents={"dim": ["head"], "hidden": ["expert"]})
PARAMS = {
    "value": jnp.arange(24.0).reshape(4, 6),
    "out": jnp.arange(30.0).reshape(6, 5),
    "experts": jnp.arange(40.0).reshape(2, 5, 4),
    "fused": jnp.arange(16.0),
    "other": jnp.arange(3.0),
}
seeds = st.integers(0, 2**31 - 1)


def equal(one: object, other: object) -> bool:
    return all(
        bool(jnp.all(a == b))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@settings(max_examples=10)
@given(seeds)
def test_the_inverse_undoes(seed: int) -> None:
    p = jm.align.random(SPEC, jax.random.key(seed))
    back = jm.align.permute(SPEC, jm.align.inverse(SPEC, p), jm.align.permute(SPEC, p, PARAMS))
    assert equal(back, PARAMS)


@settings(max_examples=10)
@given(seeds, seeds)
def test_composing_is_doing_one_after_the_other(first: int, second: int) -> None:
    p, q = (jm.align.random(SPEC, jax.random.key(seed)) for seed in (first, second))
    after = jm.align.permute(SPEC, q, jm.align.permute(SPEC, p, PARAMS))
    assert equal(after, jm.align.permute(SPEC, jm.align.compose(SPEC, p, q), PARAMS))


def test_units_within_others_go_with_them() -> None:
    permutations = {"head": [1, 0], "dim": [[2, 0, 1], [0, 1, 2]]}
    value = np.asarray(jm.align.permute(SPEC, permutations, PARAMS)["value"])
    before = np.asarray(PARAMS["value"])
    assert value[0].tolist() == before[0][[5, 3, 4, 0, 1, 2]].tolist()


def test_units_within_another_axis_go_with_it() -> None:
    permutations = {"expert": [1, 0], "hidden": [[3, 2, 1, 0], [0, 1, 2, 3]]}
    experts = np.asarray(jm.align.permute(SPEC, permutations, PARAMS)["experts"])
    before = np.asarray(PARAMS["experts"])
    assert np.array_equal(experts[0], before[1][:, ::-1])
    assert np.array_equal(experts[1], before[0])


def test_parts_of_an_axis_move_by_themselves() -> None:
    fused = jm.align.permute(SPEC, {"stream": [4, 3, 2, 1, 0]}, PARAMS)["fused"]
    assert fused.tolist() == [*range(6), 10, 9, 8, 7, 6, 15, 14, 13, 12, 11]


def test_permuting_traces_and_batches() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.vmap(lambda key: jm.align.random(SPEC, key))(keys)
    batched = jax.jit(jax.vmap(lambda p: jm.align.permute(SPEC, p, PARAMS)))(many)
    one = jm.align.permute(SPEC, jax.tree.map(lambda p: p[1], many), PARAMS)
    assert equal(jax.tree.map(lambda leaf: leaf[1], batched), one)


@pytest.mark.parametrize(
    ("permutations", "message"),
    [
        ({"heads": [0, 1]}, "no node 'heads' is permuted.*'head'"),
        (
            {"head": [0, 1, 2]},
            r"'head': expected integers of shape \[2\], found int32 of shape \[3\]",
        ),
        ({"dim": [0, 1, 2]}, r"'dim': expected integers of shape \[2, 3\]"),
        ({"head": [0.0, 1.0]}, "expected integers"),
    ],
)
def test_permutations_that_do_not_fit_are_refused(permutations: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jm.align.permute(SPEC, permutations, PARAMS)


def test_parameters_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="axis 1 of 'value' has 6 indices in the spec, 5 in"):
        jm.align.permute(SPEC, {}, {**PARAMS, "value": jnp.ones((4, 5))})
    with pytest.raises(ValueError, match=r"'value', which the model lacks.*'values'"):
        jm.align.permute(SPEC, {}, {"values": PARAMS["value"], "out": PARAMS["out"]})


def test_sizes_are_read_off_the_parameters() -> None:
    spec = PermutationSpec.from_axes({"fc1": (None, "P0"), "fc2": (("P0", 2), None)})
    sized = spec.sized({"fc1": (3, 4), "fc2": (8, 5)})
    assert sized.nodes[0].size == 4
    with pytest.raises(ValueError, match="axis 0 of 'fc2' has 8 indices in the spec, 9 in"):
        spec.sized({"fc1": (3, 4), "fc2": (9, 5)})


def test_nodes_within_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="within itself"):
        PermutationSpec.from_axes({"w": (("a", "b"),)}, parents={"a": ["b"], "b": ["a"]})
    with pytest.raises(ValueError, match="'heads' is no node"):
        PermutationSpec.from_axes({"w": (("a", "b"),)}, parents={"b": ["heads"]})
