"""Slices, gradients, filters and modules: which tensor is merged of which, with which number."""

import json
from pathlib import Path

import numpy as np
import pytest
from recipes.layered import LAYERS, Tensors, draw, merge, save

from jaxmerge.recipes import make_plan, parse

Q = "model.layers.{}.self_attn.q_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensors]:
    monkeypatch.chdir(tmp_path)
    return {name: save(tmp_path / name, draw(i)) for i, name in enumerate(("a", "b", "base"))}


def mixed(models: dict[str, Tensors], name: str, of_a: float, of_b: float) -> np.ndarray:
    a, b = (models[m][name].astype(np.float64) for m in ("a", "b"))
    return (of_a * a + of_b * b) / (of_a + of_b)


def assert_is(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def test_a_gradient_runs_from_the_first_layer_to_the_last(models: dict, tmp_path: Path) -> None:
    merged = merge(
        """
merge_method: linear
models:
- {model: a, parameters: {weight: [0, 2, 1]}}
- {model: b, parameters: {weight: 1}}
""",
        tmp_path / "out",
    )
    for layer, weight in enumerate((0.0, 2.0, 1.0)):
        assert_is(merged[UP.format(layer)], mixed(models, UP.format(layer), weight, 1))
    # Outside of the layers a gradient counts as at its beginning.
    for name in (EMBED, NORM, HEAD):
        assert_is(merged[name], models["b"][name])


def test_between_its_points_a_gradient_is_interpolated(models: dict, tmp_path: Path) -> None:
    merged = merge(
        """
merge_method: linear
models:
- {model: a, parameters: {weight: [1, 3]}}
- {model: b, parameters: {weight: 1}}
""",
        tmp_path / "out",
    )
    assert_is(merged[Q.format(1)], mixed(models, Q.format(1), 2, 1))


def test_the_first_filter_that_fits_decides(models: dict, tmp_path: Path) -> None:
    merged = merge(
        """
merge_method: linear
models:
- model: a
  parameters:
    weight:
    - {filter: layers.1, value: 7}
    - {filter: mlp, value: [1, 5]}
    - {filter: lm_head, value: 0}
    - {value: 2}
- {model: b, parameters: {weight: 1}}
""",
        tmp_path / "out",
    )
    weights = {
        UP.format(0): 1,
        UP.format(1): 7,
        Q.format(1): 7,
        UP.format(2): 5,
        Q.format(2): 2,
        HEAD: 0,
        NORM: 2,
    }
    for name, weight in weights.items():
        assert_is(merged[name], mixed(models, name, weight, 1))


def test_what_is_set_more_closely_wins(models: dict, tmp_path: Path) -> None:
    merged = merge(
        """
merge_method: linear
slices:
- sources:
  - {model: a, layer_range: [0, 1], parameters: {weight: 3}}
  - {model: b, layer_range: [0, 1]}
  parameters: {weight: 5}
- sources:
  - {model: a, layer_range: [1, 3]}
  - {model: b, layer_range: [1, 3]}
parameters: {weight: 1}
""",
        tmp_path / "out",
    )
    assert_is(merged[UP.format(0)], mixed(models, UP.format(0), 3, 5))
    assert_is(merged[EMBED], mixed(models, EMBED, 3, 5))
    assert_is(merged[UP.format(2)], mixed(models, UP.format(2), 1, 1))
    assert_is(merged[HEAD], mixed(models, HEAD, 1, 1))


def test_layers_are_stacked_in_the_order_of_slices(models: dict, tmp_path: Path) -> None:
    merged = merge(
        """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources:
  - model: b
    layer_range: [1, 3]
    parameters: {scale: [{filter: up_proj, value: 0.5}, {value: 1}]}
- sources: [{model: a, layer_range: [0, 1]}]
""",
        tmp_path / "out",
    )
    origins = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 0)]
    for layer, (model, number) in enumerate(origins):
        assert_is(merged[Q.format(layer)], models[model][Q.format(number)])
        scale = 0.5 if model == "b" else 1
        assert_is(merged[UP.format(layer)], scale * models[model][UP.format(number)])
    assert_is(merged[EMBED], models["a"][EMBED])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == [f"kind {number}" for _, number in origins]


def test_layers_of_different_depths_are_merged(models: dict, tmp_path: Path) -> None:
    deep = save(tmp_path / "deep", draw(9, 5), 5)
    merged = merge(
        """
merge_method: linear
slices:
- sources:
  - {model: a, layer_range: [0, 3]}
  - {model: deep, layer_range: [2, 5]}
parameters: {weight: 1}
""",
        tmp_path / "out",
    )
    expected = (models["a"][UP.format(1)].astype(np.float64) + deep[UP.format(3)]) / 2
    assert_is(merged[UP.format(1)], expected)


def test_each_slice_may_have_a_base_of_its_own(models: dict, tmp_path: Path) -> None:
    merged = merge(
        """
merge_method: task_arithmetic
base_model: base
slices:
- base_model: b
  sources:
  - {model: a, layer_range: [0, 1]}
  - {model: b, layer_range: [0, 1]}
- sources:
  - {model: a, layer_range: [1, 3]}
  - {model: base, layer_range: [1, 3]}
parameters: {weight: 0.25}
""",
        tmp_path / "out",
    )
    assert_is(merged[UP.format(0)], mixed(models, UP.format(0), 0.25, 0.75))
    base = models["base"][UP.format(1)].astype(np.float64)
    assert_is(merged[UP.format(1)], base + 0.25 * (models["a"][UP.format(1)] - base))


def test_more_models_at_the_end_than_at_the_beginning_are_told(models: dict) -> None:
    plan = make_plan(
        parse(
            """
merge_method: linear
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources:
  - {model: a, layer_range: [2, 3]}
  - {model: b, layer_range: [2, 3]}
parameters: {weight: 1}
"""
        )
    )
    (text,) = [note for note in plan.notes if "after the last layer" in note]
    assert "mergekit" in text
    (head,) = [tensor for tensor in plan.tensors if tensor.name == HEAD]
    assert len(head.models) == 2


@pytest.mark.parametrize("kind", ["union", "intersection"])
def test_tensors_that_one_model_lacks(models: dict, tmp_path: Path, kind: str) -> None:
    save(tmp_path / "more", {**models["b"], "extra.weight": np.ones(2, np.float32)})
    recipe = f"""
merge_method: linear
tensors: {kind}
models: [{{model: a}}, {{model: more}}]
parameters: {{weight: 1}}
"""
    merged = merge(recipe, tmp_path / "out")
    assert ("extra.weight" in merged) == (kind == "union")
    assert len(merged) == 2 * LAYERS + 3 + (kind == "union")
    if kind == "union":
        assert merged["extra.weight"].tolist() == [1, 1]


def test_a_filter_that_no_name_contains_is_noted(models: dict) -> None:
    recipe = """
merge_method: linear
models:
- {model: a, parameters: {weight: [{filter: self_atn, value: 0}, {filter: mlp, value: 2}, {value: 1}]}}
- {model: b, parameters: {weight: [{filter: "*", value: 1}]}}
"""
    assert make_plan(parse(recipe)).notes == (
        "filter 'self_atn' is in the name of no tensor that is merged; did you mean 'self_attn'?",
    )
