"""Paths as data: slots that run them, text that tells them, recipes that say them."""

import itertools
import json

import numpy as np
import pytest
import yaml

from jaxmerge.recipes import dump, parse
from jaxmerge.search.dataflow.path import Path, path_of
from jaxmerge.search.dataflow.slots import Slots

PATH = Path(layers=(0, 1, 4, 3, 4), scales=(1.0, 1.0, 0.5, 1.0, 4.0), sources=(2, 3))


@pytest.mark.parametrize("layers", [(0, 1, 4, 3, 4), (4, 4, 4), (2,), ()])
def test_a_path_runs_in_as_few_rounds_as_it_takes(layers: tuple[int, ...]) -> None:
    path = Path(layers, (1.0,) * len(layers), (2, 3))
    assert tuple(np.flatnonzero(path.on) % 5) == layers
    falls = sum(a >= b for a, b in itertools.pairwise(layers))
    assert len(path.on) == 5 * (falls + 1)
    again = path_of(Slots((2, 3), len(path.on) // 5), path.on, np.ones(len(path.on)))
    assert again == path


def test_a_recipe_has_a_slice_for_every_run_of_layers() -> None:
    path = Path((0, 1, 4, 3, 4), (1.0,) * 5, (2, 3))
    slices = yaml.safe_load(path.recipe(["a", "b"]))["slices"]
    (first, second, third) = [one["sources"][0] for one in slices]
    assert first == {"model": "a", "layer_range": [0, 2]}
    assert second == {"model": "b", "layer_range": [2, 3]}
    assert third == {"model": "b", "layer_range": [1, 3]}


def test_a_recipe_divides_what_layers_add_by_the_scales_until_then() -> None:
    slices = yaml.safe_load(PATH.recipe(["a", "b"], outputs=["out"]))["slices"]
    sources = [one["sources"][0] for one in slices]
    ranges = [(one["model"], *one["layer_range"]) for one in sources]
    assert ranges == [("a", 0, 2), ("b", 2, 3), ("b", 1, 2), ("b", 2, 3)]
    values = [one.get("parameters", {}).get("scale") for one in sources]
    # Products of scales: 1, 1, 0.5, 0.5, 2.
    assert values == [
        None,
        [{"filter": "out", "value": 2.0}, {"value": 1.0}],
        [{"filter": "out", "value": 2.0}, {"value": 1.0}],
        [{"filter": "out", "value": 0.5}, {"value": 1.0}],
    ]


def test_the_ends_may_be_another_models() -> None:
    plain = Path((0, 1, 4), (1.0,) * 3, (2, 3))
    slices = yaml.safe_load(plain.recipe(["a", "b"], ends="a"))["slices"]
    found = [(s["sources"][0]["model"], *s["sources"][0]["layer_range"]) for s in slices]
    assert found == [("a", 0, 2), ("b", 2, 3), ("a", 0, 0)]


def test_a_recipe_is_one_that_the_schema_reads() -> None:
    text = PATH.recipe(["a", "b"], ends="b")
    assert yaml.safe_load(dump(parse(text))) == yaml.safe_load(text)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_recipe_without_scales_leaves_them_out(scale: float) -> None:
    path = Path((0, 3), (1.0, scale), (2, 3))
    with pytest.raises(ValueError, match="layer 1 of the path has scale"):
        path.recipe(["a", "b"])
    assert "parameters" not in path.recipe(["a", "b"], outputs=None)


def test_what_no_recipe_can_say_is_refused() -> None:
    with pytest.raises(ValueError, match="the path is empty"):
        Path((), (), (2, 3)).recipe(["a", "b"])
    with pytest.raises(ValueError, match="2 sources, found 1 models"):
        PATH.recipe(["a"])
    with pytest.raises(ValueError, match="ends='c' is none of"):
        PATH.recipe(["a", "b"], ends="c")
    with pytest.raises(ValueError, match="2 layers, but 1 scales"):
        Path((0, 1), (1.0,), (2,))
    with pytest.raises(ValueError, match="there is no 2"):
        Path((2,), (1.0,), (2,))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        json.dumps({"sources": [2], "path": [{"source": 0, "layer": 2, "scale": 1}]}),
        json.dumps({"sources": [2], "path": [{"source": -1, "layer": 0, "scale": 1}]}),
        json.dumps({"sources": [2], "path": [{"source": 0, "layer": 0}]}),
        json.dumps({"sources": [2], "path": 3}),
    ],
)
def test_text_that_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a path|has no layer"):
        Path.from_json(text)
