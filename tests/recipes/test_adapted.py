"""Models with adapters in recipes: W + s B A as it is read, and adapters that do not fit."""

import json
import re

import numpy as np
import pytest

from jaxmerge.converters import load_checkpoint, open_checkpoint, save_checkpoint
from jaxmerge.recipes import PlanError, make_plan, parse, run
from jaxmerge.recipes.inputs import read_whole

EMBEDDING, HEAD, LAYER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.up.weight"
PREFIX = "base_model.model."


def write_model(folder, *, tied=False, **config):
    folder.mkdir()
    rng = np.random.default_rng(0)
    shapes = {EMBEDDING: (6, 3), LAYER: (5, 3), HEAD: (6, 3)}
    if tied:
        del shapes[HEAD]
    tensors = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    save_checkpoint(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 6, **config}))
    return tensors


def write_adapter(folder, shapes, **config):
    folder.mkdir()
    rng = np.random.default_rng(1)
    tensors = {
        PREFIX + name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_checkpoint(folder / "adapter_model.safetensors", tensors)
    text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1, **config})
    (folder / "adapter_config.json").write_text(text)
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}


def up(inputs=3, outputs=5, module="model.layers.0.up"):
    return {f"{module}.lora_A.weight": (2, inputs), f"{module}.lora_B.weight": (outputs, 2)}


def embedding(module="model.embed_tokens"):
    return {f"{module}.lora_embedding_A": (2, 6), f"{module}.lora_embedding_B": (3, 2)}


RECIPE = """\
merge_method: linear
models:
- {model: m+l, parameters: {weight: 1}}
- {model: m, parameters: {weight: 3}}
"""


def adapted(plan, name):
    (tensor,) = (tensor for tensor in plan.tensors if tensor.name == name)
    checkpoints = [open_checkpoint(source.path, key=source.key) for source in plan.sources]
    return [read_whole(checkpoints, plan, one) for one in tensor.models]


def test_an_adapter_is_added_to_what_it_changes_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "m")
    factors = write_adapter(tmp_path / "l", up() | embedding() | {HEAD: (6, 3)})
    plan = make_plan(parse(RECIPE), out=tmp_path / "out")
    a, b = (factors[f"model.layers.0.up.lora_{side}.weight"] for side in "AB")
    changed, own = adapted(plan, LAYER)
    np.testing.assert_allclose(changed, model[LAYER] + 0.5 * (b @ a), rtol=1e-6)
    np.testing.assert_array_equal(own, model[LAYER])
    a, b = (factors[f"model.embed_tokens.lora_embedding_{side}"] for side in "AB")
    changed, own = adapted(plan, EMBEDDING)
    np.testing.assert_allclose(changed, model[EMBEDDING] + 0.5 * (b @ a).T, rtol=1e-6)
    np.testing.assert_array_equal(adapted(plan, HEAD)[0], factors[HEAD])
    run(plan)
    merged = load_checkpoint(tmp_path / "out")[EMBEDDING]
    np.testing.assert_allclose(merged, 0.25 * changed + 0.75 * own, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_a_head_that_is_the_embedding_changes_the_embedding(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "m", tied=True, tie_word_embeddings=True)
    factors = write_adapter(tmp_path / "l", up(3, 6, "lm_head"))
    plan = make_plan(parse(RECIPE))
    a, b = (factors[f"lm_head.lora_{side}.weight"] for side in "AB")
    changed = adapted(plan, EMBEDDING)[0]
    np.testing.assert_allclose(changed, model[EMBEDDING] + 0.5 * (b @ a), rtol=1e-6)
    assert any("which is tied to it, is changed in its place" in note for note in plan.notes)


def test_the_output_keeps_the_dtype_of_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "m")
    half = {name: value.astype(np.float16) for name, value in model.items()}
    save_checkpoint(tmp_path / "m" / "model.safetensors", half)
    write_adapter(tmp_path / "l", up())
    plan = make_plan(parse(RECIPE))
    assert {tensor.dtype for tensor in plan.tensors} == {"float16"}
    assert adapted(plan, LAYER)[0].dtype == np.float32


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (up(module="model.layers.1.up"), "l: it changes 'model.layers.1.up.weight', which m does"),
        (up(inputs=4), "has shape [5, 4], but 'model.layers.0.up.weight' of the model has [5, 3]"),
        ({"model.layers.0.up.lora_A.weight": (2, 3)}, "has no partner lora_B"),
    ],
)
def test_adapters_that_do_not_fit_are_found_before_any_work(tmp_path, monkeypatch, shapes, message):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m")
    write_adapter(tmp_path / "l", shapes)
    with pytest.raises(PlanError, match=re.escape(message)):
        make_plan(parse(RECIPE))


def test_a_folder_that_is_no_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m")
    write_model(tmp_path / "l")
    with pytest.raises(PlanError, match=r"3: l: no LoRA adapter: adapter_config\.json is missing"):
        make_plan(parse(RECIPE))
