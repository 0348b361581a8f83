"""CLIP: the functions of transformers' models, both towers and each, and exact round trips."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_round_trip, random_checkpoint, random_params
from pretrained import assert_pretrained, torch_output, transformers

from jaxmerge.converters import (
    CheckpointError,
    ModelConfig,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_model,
)
from jaxmerge.models import (
    CLIP,
    CLIPConfig,
    CLIPTextConfig,
    ViTConfig,
    image_features,
    text_features,
)

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = SIZES | {
    "vocab_size": 30,
    "max_position_embeddings": 10,
    "eos_token_id": 29,
    "bos_token_id": 1,
}
VISION = SIZES | {"hidden_size": 12, "image_size": 8, "patch_size": 4, "num_channels": 2}
FLAX = CLIPConfig(
    CLIPTextConfig(30, 8, 1, 2, 16, 10, end_id=29),
    ViTConfig(
        (8, 8), (4, 4), 8, 1, 2, 16, activation="quick_gelu", norm_eps=1e-5, patch_bias=False,
        embedding_norm=True,
    ),
    projection_size=6,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 29, (3, 9))
IDS[[0, 1, 2], [8, 5, 3]] = 29
MASK = (np.arange(9)[None] <= np.array([[8], [5], [3]])).astype(int)
IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 2)).astype(np.float32)
WORDS = {"input_ids": IDS, "attention_mask": MASK}
INPUTS = WORDS | {"pixel_values": IMAGES}


@pytest.mark.torch
@pytest.mark.parametrize("end", [29, 2])
def test_transformers_computes_the_same(tmp_path: Path, end: int) -> None:
    library = transformers()
    text = TEXT | {"eos_token_id": end, "hidden_act": "gelu" if end == 2 else "quick_gelu"}
    settings = library.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=6)
    model = library.CLIPModel(settings)
    config = assert_pretrained(model, INPUTS, lambda output: output.logits_per_image, tmp_path)
    assert config.model.text.end_id == (None if end == 2 else 29)

    _, params, _ = load_model(tmp_path / "source")
    for features, inputs, function in [
        ("text", WORDS, text_features(config.model)),
        ("image", {"pixel_values": IMAGES}, image_features(config.model)),
    ]:
        method = getattr(model, f"get_{features}_features")
        expected = torch_output(method, inputs, lambda output: output.pooler_output)
        np.testing.assert_allclose(
            jax.jit(function)(params, inputs), expected, atol=1e-5, rtol=1e-5
        )
    assert text_features(config.model) is text_features(replace(config.model))


@pytest.mark.torch
@pytest.mark.parametrize("tower", ["Text", "Vision"])
@pytest.mark.parametrize("projected", [False, True])
def test_a_tower_alone_gives_its_features(tmp_path: Path, tower: str, projected: bool) -> None:
    library = transformers()
    sizes = (TEXT if tower == "Text" else VISION) | {"projection_dim": 6}
    settings = getattr(library, f"CLIP{tower}Config")(**sizes)
    kind = getattr(library, f"CLIP{tower}Model{'WithProjection' if projected else ''}")
    features = "text_embeds" if tower == "Text" else "image_embeds"
    config = assert_pretrained(
        kind(settings),
        WORDS if tower == "Text" else {"pixel_values": IMAGES},
        lambda output: getattr(output, features if projected else "pooler_output"),
        tmp_path,
    )
    assert config.model.projection_size == (6 if projected else None)


@pytest.mark.torch
def test_a_model_that_was_made_in_jax_loads_in_transformers(tmp_path: Path) -> None:
    library = transformers()
    inputs = INPUTS | {"pixel_values": np.ones((2, 8, 8, 3), np.float32)}
    params = random_params(CLIP(FLAX), inputs)
    save_model(tmp_path, params, ModelConfig("clip", FLAX))
    model, info = library.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    expected = torch_output(model, inputs, lambda output: output.logits_per_image)
    np.testing.assert_allclose(
        jax.jit(CLIP(FLAX).apply)(params, inputs), expected, atol=1e-5, rtol=1e-5
    )
    assert load_model(tmp_path)[2].model == FLAX


def test_older_checkpoints_of_an_image_tower_keep_their_prefix(tmp_path: Path) -> None:
    config = CLIPConfig(None, FLAX.vision, None)
    tensors = {f"vision_model.{k}": t for k, t in random_checkpoint("clip", config).items()}
    ids = {"vision_model.embeddings.position_ids": np.arange(5)[None]}
    save_checkpoint(tmp_path / "in", tensors | ids)
    text = SIZES | {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
    (tmp_path / "in/config.json").write_text(json.dumps(text | {"model_type": "clip_vision_model"}))
    _, params, loaded = load_model(tmp_path / "in")
    assert (loaded.prefix, loaded.model) == ("vision_model.", config)
    save_model(tmp_path / "out", params, loaded)
    assert set(load_checkpoint(tmp_path / "out")) == set(tensors)


@settings(max_examples=10)
@given(
    towers=st.sampled_from(["both", "text", "vision"]),
    projected=st.booleans(),
    layers=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    heads=st.integers(1, 3),
    patches=st.integers(1, 2),
    patch=st.integers(1, 3),
)
def test_round_trips_are_exact(
    towers: str, projected: bool, layers: tuple[int, int], heads: int, patches: int, patch: int
) -> None:
    text = CLIPTextConfig(7, heads * 2, layers[0], heads, 3, 5, end_id=6)
    vision = replace(
        FLAX.vision,
        image_size=(patches * patch, patches * patch),
        patch_size=(patch, patch),
        hidden_size=heads,
        num_layers=layers[1],
        num_heads=heads,
    )
    model = CLIPConfig(
        None if towers == "vision" else text,
        None if towers == "text" else vision,
        4 if projected or towers == "both" else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip("clip", model, Path(folder))


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        (
            {"text_config": {"hidden_act": "sigmoidal"}},
            {},
            "hidden_act 'sigmoidal' is not supported",
        ),
        ({"text_config": {"eos_token_id": [1, 2]}}, {}, r"eos_token_id: .*, found \[1, 2\]"),
        ({"vision_config": {"image_size": [8, 8, 3]}}, {}, r"image_size: .*found \[8, 8, 3\]"),
        ({}, {"logit_scale": None}, "missing 'logit_scale'"),
        ({}, {"logit_bias": np.zeros((), "f4")}, "unexpected 'logit_bias'"),
        ({"projection_dim": 5}, {}, r"text_projection.weight' expected \[5, 8\], found \[6, 8\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, fields: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    from jaxmerge.converters import families

    changed = {**random_checkpoint("clip", FLAX), **tensors}
    save_checkpoint(tmp_path, {name: one for name, one in changed.items() if one is not None})
    text = families.get("clip").json(FLAX)
    for key, value in fields.items():
        text[key] = {**text[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (WORDS, "input 'pixel_values' is missing"),
        (IDS, "a dict with inputs 'input_ids', 'pixel_values', found one array"),
        (INPUTS, r"images: expected \[.*\] = \[batch, 8, 8, 3\], found \[2, 8, 8, 2\]"),
        (
            {"input_ids": np.ones((1, 11), int), "pixel_values": np.ones((2, 8, 8, 3))},
            "11 tokens, but the model has positions for 10",
        ),
    ],
)
def test_inputs_that_do_not_fit_say_so(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(CLIP(FLAX).init, jax.random.key(0), inputs)
