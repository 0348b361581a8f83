"""Spaces: bounds, kinds, conditions, and the genome between."""

from typing import Any

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import jaxmerge as jm
from jaxmerge.search import binary, categorical, continuous, integer, space, when

MIXED = space(
    {
        "weight": continuous(-2.0, 3.0, shape=(2,), initial=[1.0, 0.0]),
        "rate": continuous(1e-4, 10.0, scale="log"),
        "rank": integer(-1, 4, shape=(2,)),
        "method": categorical(["linear", "ties", "dare"]),
        "share": categorical([0.1, 0.5, 1.0], shape=(2,)),
        "on": binary(shape=(3,), probability=0.8),
        "density": continuous(0.1, 0.9, initial=0.3, when=when("method", "ties")),
        "scale": continuous(0.0, 2.0, shape=(3,), when=when("on")),
        "pair": continuous(
            -1.0, 1.0, shape=(2,), when=(when("on", index=[0, 1]), when("on", index=[1, -1]))
        ),
        "deep": integer(0, 9, initial=7, when=when("rank", 2, index=1)),
        "deeper": binary(when=when("deep", 5)),
    }
)
genomes = arrays(np.float32, MIXED.size, elements=st.floats(-0.5, 1.5, width=32), fill=st.nothing())
decode = jax.jit(MIXED.decode)
active = jax.jit(MIXED.active)


@hypothesis.settings(max_examples=60)
@given(genomes)
def test_a_decoded_point_keeps_every_bound(genome: np.ndarray) -> None:
    point = decode(genome)
    assert ((point["weight"] >= -2) & (point["weight"] <= 3)).all()
    assert 1e-4 <= float(point["rate"]) <= 10
    assert ((point["rank"] >= -1) & (point["rank"] <= 4)).all()
    assert int(point["method"]) in range(3)
    assert np.isin(point["share"], np.float32([0.1, 0.5, 1.0])).all()
    assert 0.1 <= float(point["density"]) <= 0.9
    assert {k: v.dtype for k, v in point.items() if k in ("rank", "on", "weight", "share")} == {
        "rank": jnp.int32,
        "on": jnp.bool_,
        "weight": jnp.float32,
        "share": jnp.float32,
    }


@hypothesis.settings(max_examples=60)
@given(genomes)
def test_encoding_a_point_and_decoding_it_gives_it_back(genome: np.ndarray) -> None:
    point = decode(genome)
    again = decode(MIXED.encode(point))
    chex.assert_trees_all_close(again, point, rtol=1e-5, atol=1e-6)


@hypothesis.settings(max_examples=60)
@given(genomes, st.integers(0, 2**32 - 1))
def test_inactive_coordinates_do_not_move_the_point(genome: np.ndarray, seed: int) -> None:
    mask = np.asarray(active(genome))
    noise = np.random.default_rng(seed).random(MIXED.size).astype(np.float32)
    moved = np.where(mask, genome, noise)
    chex.assert_trees_all_equal(decode(moved), decode(genome))
    np.testing.assert_array_equal(active(moved), mask)


@hypothesis.settings(max_examples=60)
@given(genomes)
def test_activity_follows_the_conditions(genome: np.ndarray) -> None:
    point = {name: np.asarray(value) for name, value in decode(genome).items()}
    mask = np.asarray(active(genome))
    of = {column.path: bool(mask[column.start]) for column in MIXED.columns}
    on = point["on"]
    assert of["density"] == (point["method"] == 1)
    assert [of[f"scale[{i}]"] for i in range(3)] == on.tolist()
    assert of["pair[0]"] == (on[0] and on[1])
    assert of["pair[1]"] == on[1]
    assert of["deep"] == (point["rank"][1] == 2)
    assert of["deeper"] == (of["deep"] and point["deep"] == 5)
    assert all(of[f"{name}[0]"] for name in ("weight", "rank", "share", "on"))
    # What is inactive has its initial value.
    assert of["density"] or point["density"] == np.float32(0.3)
    assert of["deep"] or point["deep"] == 7
    assert (point["scale"][~on] == 1.0).all()


def test_coordinates_mean_what_the_documentation_says() -> None:
    made = space(
        [
            continuous(-1.0, 3.0),
            continuous(0.01, 100.0, scale="log"),
            integer(3, 6),
            binary(),
            categorical(["a", "b"]),
            categorical([1, 2, 4]),
        ]
    )
    genome = jnp.array([0.25, 0.25, 0.5, 0.5, 0.7, 0.7, 0.1, 0.2, 0.9])
    decoded = [float(x) for x in made.decode(genome)]
    np.testing.assert_allclose(decoded, [0.0, 0.1, 5, 0, 0, 4], rtol=1e-6, atol=1e-6)
    cells = [int(made.decode(genome.at[2].set(u))[2]) for u in (0.0, 0.24, 0.26, 0.74, 0.76, 1.0)]
    assert cells == [3, 3, 4, 5, 6, 6]
    assert made.levels.tolist() == [0, 0, 4, 2, 2, 3]
    assert [(c.path, c.kind, c.start, c.width) for c in made.columns][3:] == [
        ("3", "binary", 3, 1),
        ("4", "categorical", 4, 2),
        ("5", "categorical", 6, 3),
    ]


def test_a_search_starts_at_the_initial_values() -> None:
    start = MIXED.initial_genome()
    point = MIXED.decode(start)
    np.testing.assert_allclose(point["weight"], [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(point["rate"], 10**-1.5, rtol=1e-4)
    assert point["rank"].tolist() == [1, 1]
    columns = {column.path: column for column in MIXED.columns}
    assert start[columns["on[1]"].start] == np.float32(0.8)
    method = columns["method"]
    assert start[method.start : method.start + 3].tolist() == [0.5] * 3


def test_columns_name_their_parents() -> None:
    columns = {column.path: column for column in MIXED.columns}
    order = [column.path for column in MIXED.columns]
    assert columns["pair[0]"].parents == ((order.index("on[0]"), 1), (order.index("on[1]"), 1))
    assert columns["pair[1]"].parents == ((order.index("on[1]"), 1),)
    assert columns["density"].parents == ((order.index("method"), 1),)
    assert columns["deep"].parents == ((order.index("rank[1]"), 3),)


def test_names_may_stand_for_choices() -> None:
    point = {**MIXED.decode(MIXED.initial_genome()), "method": "dare", "share": [0.5, 0.1]}
    again = MIXED.decode(MIXED.encode(point))
    assert int(again["method"]) == 2
    np.testing.assert_array_equal(again["share"], np.float32([0.5, 0.1]))


def test_gradients_reach_continuous_coordinates_only() -> None:
    gradient = jax.grad(lambda genome: jnp.sum(MIXED.decode(genome)["weight"]))(
        MIXED.initial_genome()
    )
    starts = [column.start for column in MIXED.columns if column.path.startswith("weight")]
    np.testing.assert_allclose(gradient[np.array(starts)], [5.0, 5.0], rtol=1e-6)
    assert int((gradient != 0).sum()) == 2


def test_equal_spaces_are_one_static_argument() -> None:
    def make() -> jm.search.Space:
        return space({"x": continuous(0, 1), "y": binary()})

    assert make() == make()
    assert hash(make()) == hash(make())
    assert make().fingerprint == make().fingerprint
    assert make().fingerprint != MIXED.fingerprint
    decode_all = jax.jit(
        chex.assert_max_traces(lambda made, genome: made.decode(genome), 1), static_argnums=0
    )
    decode_all(make(), jnp.zeros(2))
    decode_all(make(), jnp.ones(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: continuous(1.0, 0.0), "lower bound must be smaller"),
        (lambda: continuous(0.5, 0.5), "lower bound must be smaller"),
        (lambda: continuous(0.0, float("inf")), "no finite number"),
        (lambda: continuous(0.0, 1.0, scale="log"), "log scale needs a lower bound above 0"),
        (lambda: continuous(1.0, 2.0, scale="lin"), "did you mean 'linear'"),
        (lambda: continuous(1.0, 1.0 + 1e-12), "cannot tell the bounds apart"),
        (lambda: continuous(0.0, 1.0, initial=2.0), "initial value 2.0 is out of bounds"),
        (lambda: continuous(0.0, 1.0, shape=(2,), initial=[0.0]), r"shape \[1\], not \[2\]"),
        (lambda: continuous(0.0, 1.0, shape=(0,)), "a shape holds whole numbers above 0"),
        (lambda: integer(2, 1), "lower bound must be smaller"),
        (lambda: integer(0.5, 2), "whole numbers"),
        (lambda: integer(0, 2**31), "beyond int32"),
        (lambda: integer(0, 3, initial=1.5), "no whole number in the bounds"),
        (lambda: categorical([]), "nothing to choose from"),
        (lambda: categorical(["a", "b", "a"]), "'a' is given twice"),
        (lambda: binary(probability=1.5), r"lies in \[0, 1\]"),
        (lambda: space({}), "no variables"),
        (lambda: space({"a/b": binary(), "a": {"b": binary()}}), "same path 'a/b'"),
        (lambda: space({"on": binary(), "x": binary(when=when("om"))}), "did you mean 'on'"),
        (lambda: space({"x": binary(when=when("x"))}), "circle: 'x' -> 'x'"),
        (
            lambda: space({"x": binary(when=when("y")), "y": binary(when=when("x"))}),
            "conditions in a circle",
        ),
        (
            lambda: space({"x": continuous(0, 1), "y": binary(when=when("x"))}),
            "a continuous variable cannot be a condition",
        ),
        (
            lambda: space(
                {"m": categorical(["ties", "dare"]), "y": binary(when=when("m", "tise"))}
            ),
            "'tise' is no value of it; did you mean 'ties'",
        ),
        (
            lambda: space({"m": binary(shape=(2,)), "y": binary(shape=(3,), when=when("m"))}),
            r"shape \[3\] does not match the parent's \[2\]",
        ),
        (
            lambda: space({"m": binary(shape=(2,)), "y": binary(when=when("m", index=2))}),
            "index 2 names no element",
        ),
        (
            lambda: space(
                {
                    "m": categorical(["a", "b"]),
                    "x": binary(when=when("m", "a")),
                    "y": binary(when=(when("x"), when("m", "b"))),
                }
            ),
            "y can never be active: its conditions need two values of 'm'",
        ),
    ],
)
def test_empty_and_contradictory_spaces_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_variable_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a/0: expected a variable .* found 3.0"):
        space({"a": [3.0]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": [1.0, 9.0]}, r"weight: 9 does not lie in \[-2, 3\]"),
        ({"rank": [0, 7]}, "rank: 7 is no whole number"),
        ({"method": "tis"}, "'tis' is none of the choices .* did you mean 'ties'"),
        ({"on": [True, True]}, r"on: expected shape \[3\], found \[2\]"),
        ({"densty": 0.3}, "no variable 'densty'; did you mean 'density'"),
    ],
)
def test_what_is_no_point_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MIXED.encode({**MIXED.decode(MIXED.initial_genome()), **change})


def test_a_population_is_no_genome() -> None:
    with pytest.raises(ValueError, match=r"expected a genome of shape \[\d+\], found \[4, \d+\]"):
        MIXED.decode(jnp.zeros((4, MIXED.size)))
