"""Vision transformers: the functions of transformers' models and of timm's layout, and exact round trips."""

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
from parity import assert_parity, assert_round_trip, random_checkpoint, random_params, randomise
from pretrained import assert_pretrained, torch_output, transformers

from jaxmerge.converters import (
    CheckpointError,
    ModelConfig,
    families,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_model,
)
from jaxmerge.models import ViT, ViTConfig

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": [8, 12],
    "patch_size": [4, 3],
}
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
INPUTS = {"pixel_values": IMAGES}
TINY = ViTConfig((8, 8), (4, 4), 8, 1, 2, 16)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("ViTModel", {"qkv_bias": False, "pooler_output_size": 5}),
        ("ViTForImageClassification", {"num_labels": 7, "hidden_act": "gelu_new"}),
    ],
)
def test_transformers_computes_the_same(
    tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    library = transformers()
    model = getattr(library, architecture)(library.ViTConfig(**SIZES, **options))
    last = "logits" if "num_labels" in options else "last_hidden_state"
    config = assert_pretrained(model, INPUTS, lambda output: getattr(output, last), tmp_path)
    assert config.family == "vit"
    assert config.model.pooler_size == options.get("pooler_output_size")
    assert config.model.num_labels == options.get("num_labels", 0)


@pytest.mark.torch
def test_a_model_that_was_made_in_jax_loads_in_transformers(tmp_path: Path) -> None:
    library = transformers()
    config = replace(TINY, num_labels=5, activation="gelu_tanh", image_size=(8, 12))
    params = random_params(ViT(config), IMAGES)
    save_model(tmp_path, params, ModelConfig("vit", config))
    model, info = library.ViTForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    expected = torch_output(model, INPUTS, lambda output: output.logits)
    found = jax.jit(ViT(config).apply)(params, IMAGES)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert load_model(tmp_path)[2].model == config


def timm_module(config: ViTConfig) -> Any:
    """A torch vision transformer with the names of timm's `VisionTransformer`."""
    import torch
    from torch import nn

    size, inside = config.hidden_size, config.intermediate_size

    def norm(width: int = size) -> Any:
        return nn.LayerNorm(width, eps=1e-6)

    class PatchEmbed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            patch: Any = config.patch_size
            self.proj = nn.Conv2d(3, size, patch, stride=patch, bias=config.patch_bias)

        def forward(self, x: Any) -> Any:
            return self.proj(x).flatten(2).transpose(1, 2)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(size, 3 * size, bias=config.qkv_bias)
            self.proj = nn.Linear(size, size)
            width = size // config.num_heads
            self.q_norm = norm(width) if config.qk_norm else nn.Identity()
            self.k_norm = norm(width) if config.qk_norm else nn.Identity()

        def forward(self, x: Any) -> Any:
            batch, length, _ = x.shape
            shape = (batch, length, 3, config.num_heads, size // config.num_heads)
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
            q, k = self.q_norm(q), self.k_norm(k)
            mixed = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
            return self.proj(mixed.transpose(1, 2).reshape(batch, length, size))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(size, inside), nn.Linear(inside, size)

        def forward(self, x: Any) -> Any:
            return self.fc2(nn.functional.gelu(self.fc1(x)))

    class LayerScale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(size))

        def forward(self, x: Any) -> Any:
            return x * self.gamma

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = norm(), norm()
            self.attn, self.mlp = Attention(), Mlp()
            self.ls1 = LayerScale() if config.layer_scale else nn.Identity()
            self.ls2 = LayerScale() if config.layer_scale else nn.Identity()

        def forward(self, x: Any) -> Any:
            x = x + self.ls1(self.attn(self.norm1(x)))
            return x + self.ls2(self.mlp(self.norm2(x)))

    class VisionTransformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sides = zip(config.image_size, config.patch_size, strict=True)
            rows, columns = (side // patch for side, patch in sides)
            length = rows * columns + config.class_token
            self.pos_embed = nn.Parameter(torch.zeros(1, length, size))
            if config.class_token:
                self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
            self.patch_embed = PatchEmbed()
            self.norm_pre = norm() if config.embedding_norm else nn.Identity()
            self.blocks = nn.Sequential(*(Block() for _ in range(config.num_layers)))
            average = config.pooling == "average"
            self.norm = nn.Identity() if average else norm()
            self.fc_norm = norm() if average else nn.Identity()
            self.head = nn.Linear(size, config.num_labels) if config.num_labels else None

        def forward(self, x: Any) -> Any:
            x = self.patch_embed(x)
            if config.class_token:
                x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
            x = self.norm(self.blocks(self.norm_pre(x + self.pos_embed)))
            if self.head is None:
                return x
            first = int(config.class_token)
            seen = x[:, first:].mean(1) if config.pooling == "average" else x[:, 0]
            return self.head(self.fc_norm(seen))

    return VisionTransformer()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"hidden_size": 192, "num_heads": 3, "num_labels": 4}, {}),
        ({}, {"num_heads": 2}),
        (
            {
                "num_labels": 3,
                "class_token": False,
                "pooling": "average",
                "qk_norm": True,
                "layer_scale": True,
                "qkv_bias": False,
                "image_size": (8, 12),
                "patch_size": (4, 2),
            },
            {"model_args": {"img_size": [8, 12]}},
        ),
        (
            {"num_labels": 3, "pooling": "average", "embedding_norm": True, "patch_bias": False},
            {"num_heads": 2},
        ),
    ],
)
def test_the_layout_of_timm_computes_the_same(
    tmp_path: Path, changes: dict[str, Any], given: dict[str, Any]
) -> None:
    pytest.importorskip("torch")
    expected = replace(TINY, num_layers=2, fused_qkv=True, **changes)
    images = np.random.default_rng(0).normal(size=(2, *expected.image_size, 3)).astype("f4")
    config = assert_parity(randomise(timm_module(expected)), images, tmp_path, config=given or None)
    assert (config.family, config.model) == ("vit_timm", expected)


@settings(max_examples=12)
@given(
    layers=st.integers(0, 2),
    heads=st.integers(1, 3),
    patches=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    patch=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    flags=st.lists(st.booleans(), min_size=6, max_size=6),
    labels=st.integers(0, 2),
    average=st.booleans(),
    hugging_face=st.booleans(),
)
def test_round_trips_are_exact(
    layers: int,
    heads: int,
    patches: tuple[int, int],
    patch: tuple[int, int],
    flags: list[bool],
    labels: int,
    average: bool,
    hugging_face: bool,
) -> None:
    names = ("patch_bias", "qkv_bias", "class_token", "embedding_norm", "qk_norm", "layer_scale")
    options: dict[str, Any] = dict(zip(names, flags, strict=True))
    if hugging_face:
        options = {"qkv_bias": flags[0], "pooler_size": 3 if flags[1] else None}
    else:
        options |= {"fused_qkv": True, "pooling": "average" if average else "token"}
        options["class_token"] |= not average
    model = ViTConfig(
        image_size=(patches[0] * patch[0], patches[1] * patch[1]),
        patch_size=patch,
        hidden_size=heads * 2,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=3,
        num_labels=labels,
        **options,
    )
    with tempfile.TemporaryDirectory() as folder:
        assert_round_trip("vit" if hugging_face else "vit_timm", model, Path(folder))


def test_a_config_json_of_timm_stays_as_it_was(tmp_path: Path) -> None:
    model = replace(TINY, fused_qkv=True, num_labels=3)
    save_checkpoint(tmp_path / "in", random_checkpoint("vit_timm", model))
    text = {"architecture": "vit_tiny", "num_classes": 3, "model_args": {"num_heads": 2}}
    (tmp_path / "in/config.json").write_text(json.dumps(text))
    _, params, config = load_model(tmp_path / "in")
    assert config.model == model
    save_model(tmp_path / "out", params, config)
    assert json.loads((tmp_path / "out/config.json").read_text()) == text
    changed = replace(config, model=replace(model, activation="relu"))
    save_model(tmp_path / "changed", params, changed)
    assert load_model(tmp_path / "changed")[2].model == changed.model
    assert set(load_checkpoint(tmp_path / "changed")) == set(load_checkpoint(tmp_path / "in"))


@pytest.mark.parametrize(
    ("given", "tensors", "message"),
    [
        ({}, {}, "how many attention heads a width of 8 has: give config={'num_heads': ...}"),
        ({"num_heads": 3}, {}, "embed_dim 8 is not a multiple of num_heads 3"),
        (
            {"num_heads": 2},
            {"pos_embed": np.zeros((1, 7, 8), "f4")},
            r"6 patches are no square: give config={'img_size': \[height, width\]}",
        ),
        ({"num_heads": 2}, {"blocks.0.attn.proj.bias": None}, "missing 'blocks.0.attn.proj.bias'"),
        ({"num_heads": 2}, {"dist_token": np.zeros((1, 1, 8), "f4")}, "unexpected 'dist_token'"),
        ({"num_heads": 2}, {"pos_embed": None}, "no tensor 'pos_embed'"),
    ],
)
def test_what_does_not_fit_timms_layout_is_refused(
    tmp_path: Path, given: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    changed = {**random_checkpoint("vit_timm", replace(TINY, fused_qkv=True)), **tensors}
    save_checkpoint(tmp_path, {name: one for name, one in changed.items() if one is not None})
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, family="vit_timm", config=given)


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"hidden_act": "swiglu"}, {}, "hidden_act 'swiglu' is not supported"),
        ({"image_size": "large"}, {}, "image_size: .*found 'large'"),
        ({"patch_size": 2}, {}, r"position_embeddings' expected \[1, 17, 8\], found \[1, 5, 8\]"),
        ({}, {"embeddings.mask_token": np.zeros((1, 1, 8), "f4")}, "unexpected 'embeddings.mask"),
        ({}, {"layernorm.bias": None}, "missing 'layernorm.bias'"),
    ],
)
def test_what_does_not_fit_transformers_layout_is_refused(
    tmp_path: Path, fields: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    changed = {**random_checkpoint("vit", TINY), **tensors}
    save_checkpoint(tmp_path, {name: one for name, one in changed.items() if one is not None})
    text = families.get("vit").json(TINY) | fields
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"expected .* = \[batch, 8, 8, 3\], found \[2, 8, 12, 3\]"
    ):
        jax.eval_shape(ViT(TINY).init, jax.random.key(0), IMAGES)
