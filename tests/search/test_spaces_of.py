"""Spaces made from what methods say of their hyperparameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge.search import space_of

LABELS = {"fc1/**": "first", "**": "rest"}


def models() -> tuple[list[Any], Any]:
    rng = np.random.default_rng(0)
    shapes = {"fc1": {"w": (4, 3)}, "fc2": {"w": (3, 2)}}
    trees = [
        jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        for _ in range(3)
    ]
    return trees[:2], trees[2]


@pytest.mark.parametrize(
    ("name", "labels"), [("ties", None), ("karcher", LABELS), ("slerp", LABELS)]
)
def test_a_point_goes_into_the_method(name: str, labels: Any) -> None:
    method = jm.methods.get(name)()
    sources, base = models()
    sources = sources[:1] if name == "slerp" else sources
    made = space_of(method, labels, models=len(sources) + (name == "slerp"))
    state = method.init(sources, base if name in ("ties", "slerp") else None)
    genome = jax.random.uniform(jax.random.key(0), (made.size,))
    merged = method.apply(state, jax.jit(made.decode)(genome))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(merged))


def test_a_search_starts_at_the_defaults() -> None:
    method = jm.methods.ties()
    made = space_of(method, models=2)
    point = made.decode(made.initial_genome())
    for name in ("density", "weight", "scale"):
        np.testing.assert_allclose(point[name], method.hyperparams[name].default, rtol=1e-6)


def test_blocks_have_values_of_their_own() -> None:
    method = jm.methods.task_arithmetic()
    made = space_of(method, LABELS, models=2, only=["weight"])
    assert made.size == 4
    point = made.decode(made.encode({"weight": jm.tree.per_block([[1, 0], [0, 2]], LABELS)}))
    sources, base = models()
    merged = method.apply(method.init(sources, base), point)
    np.testing.assert_allclose(merged["fc1"]["w"], sources[0]["fc1"]["w"], rtol=1e-5, atol=1e-6)
    expected = base["fc2"]["w"] + 2 * (sources[1]["fc2"]["w"] - base["fc2"]["w"])
    np.testing.assert_allclose(merged["fc2"]["w"], expected, rtol=1e-4, atol=1e-5)


def test_only_the_chosen_methods_hyperparameters_are_active() -> None:
    ties = jm.methods.ties(scope="tensor")
    method = jm.methods.choose([jm.methods.task_arithmetic(), ties])
    made = space_of(method, LABELS, models=2, only=["method", "density"])
    columns = [column.path for column in made.columns]
    assert columns[:2] == ["method/values[0]", "method/values[1]"]
    method_of = jm.tree.per_block([0, 1], LABELS)
    density = jm.tree.per_block([[0.5, 0.5], [0.2, 0.9]], LABELS)
    genome = made.encode({"method": method_of, "ties": {"density": density}})
    mask = np.asarray(made.active(genome))
    active = [column.path for column in made.columns if mask[column.start]]
    assert active == [*columns[:2], "ties/density/values[1,0]", "ties/density/values[1,1]"]
    sources, base = models()
    state = method.init(sources, base)
    merged = method.apply(state, jax.jit(made.decode)(genome))
    alone = jm.merge(ties, sources, base=base, density=[0.2, 0.9])
    np.testing.assert_allclose(merged["fc2"]["w"], alone["fc2"]["w"], rtol=1e-5, atol=1e-6)
    plain = jm.merge("task_arithmetic", sources, base=base)
    np.testing.assert_allclose(merged["fc1"]["w"], plain["fc1"]["w"], rtol=1e-5, atol=1e-6)


def test_a_choice_inside_blocks_is_conditional_there() -> None:
    chosen = jm.methods.choose([jm.methods.task_arithmetic(), jm.methods.ties()])
    method = jm.methods.by_block({"first": chosen, "rest": jm.methods.linear()}, LABELS)
    made = space_of(method, models=2, only=["method", "density", "rest/weight"])
    by_path = {column.path: column for column in made.columns}
    assert sorted(by_path) == [
        "first/method",
        "first/ties/density[0]",
        "first/ties/density[1]",
        "rest/weight[0]",
        "rest/weight[1]",
    ]
    parent = [column.path for column in made.columns].index("first/method")
    assert by_path["first/ties/density[1]"].parents == ((parent, 1),)


def test_ranges_replace_a_methods_bounds() -> None:
    made = space_of(
        jm.methods.ties(),
        models=2,
        only=["density", "scale"],
        ranges={"density": (0.01, 1.0, "log"), "scale": (0.5, 1.5)},
    )
    low, high = made.decode(jnp.zeros(made.size)), made.decode(jnp.ones(made.size))
    np.testing.assert_allclose(low["density"], 0.01, rtol=1e-5)
    np.testing.assert_allclose([low["scale"], high["scale"]], [0.5, 1.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": ["densty"]}, "'densty'; did you mean 'density'"),
        ({"ranges": {"density": (0.0, 1.5)}}, r"density must lie in \[0, 1\]"),
        ({"ranges": {"density": (0.9, 0.1)}}, "density: .* lower bound must be smaller"),
        ({"ranges": {"density": (0.0, 1.0, "log")}}, "density: .* log scale"),
        ({"only": []}, "no hyperparameters to vary"),
        ({"models": 0}, "takes 1 or more models, found 0"),
    ],
)
def test_what_the_method_does_not_take_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space_of(jm.methods.ties(), **{"models": 2, **arguments})
