"""Every family of models has the symmetry that is known of it, and nothing beyond."""

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import models
from jaxmerge.models.decoder import LayerKind
from jaxmerge.models.inverted_residual import Block

RNG = np.random.default_rng(0)
IDS = np.array([[1, 2, 3, 4, 5], [3, 1, 4, 1, 5]])
Nodes = list[tuple[int, ...]]


class Family(NamedTuple):
    """A small model, and the sizes of its nodes within those of their parents, sorted."""

    module: Any
    config: Any
    inputs: Any
    nodes: Nodes


def images(height: int, width: int | None = None) -> np.ndarray:
    return RNG.standard_normal((2, height, width or height, 3))


def decoder(**options: Any) -> models.DecoderConfig:
    sizes = {"vocabulary_size": 11, "width": 16, "layers": (LayerKind(),) * 2, "context_length": 16}
    heads = {"heads": 4, "key_heads": 2, "head_width": 6, "mlp_width": 20}
    return models.DecoderConfig(**{**sizes, **heads, **options})


def transformer(layers: int, *, residual: int | None = 16, each: int = 4, heads: int = 4) -> Nodes:
    """Nodes of layers of self-attention (queries with keys, values) and MLPs around one stream."""
    layer: Nodes = [(heads,), (heads, each), (heads, each), (20,)]
    return sorted([*([] if residual is None else [(residual,)]), *layer * layers])


VISION = models.ViTConfig((8, 8), (4, 4), 16, 2, 4, 20)
TEXT = models.CLIPTextConfig(11, 16, 2, 4, 20)
RESIDUAL = models.ResNetConfig((1, 2), (8, 16))
T5 = models.T5Config(11, 16, 4, 20, 1, 1, 4)
LLAMA: Nodes = [(2,), (2, 2), (2, 6), (20,)]
FAMILIES = {
    "mlp": Family(
        models.MLP, models.MLPConfig((6, 8, 9, 3)), RNG.standard_normal((2, 6)), [(8,), (9,)]
    ),
    "vgg": Family(
        models.VGG,
        models.VGGConfig(((4,), (8,)), (6,), norm="none", pool=2),
        images(8),
        [(4,), (6,), (8,)],
    ),
    "vgg, batch norm": Family(models.VGG, models.VGGConfig(((4,), (8,))), images(8), [(4,), (8,)]),
    "resnet": Family(models.ResNet, RESIDUAL, images(8), [(8,), (8,), (16,), (16,), (16,)]),
    "resnet, layer norm": Family(
        models.ResNet, replace(RESIDUAL, norm="layer"), images(8), [(8,), (8,), (16,), (16,), (16,)]
    ),
    "resnet, group norm": Family(
        models.ResNet,
        replace(RESIDUAL, norm="group", groups=4),
        images(8),
        sorted([(4,)] * 5 + [(4, 2)] * 2 + [(4, 4)] * 3),
    ),
    "inverted residual": Family(
        models.InvertedResidualNet,
        models.InvertedResidualConfig(4, (Block(8, 4, 1, 3), Block(12, 6, 2, 3)), 10, 3),
        images(8),
        [(4,), (6,), (8,), (10,), (12,)],
    ),
    "cct": Family(
        models.CCT,
        models.CCTConfig((8, 8), (16,), layers=2, heads=2, hidden=20, classes=3),
        images(8),
        # One fused kernel whose queries, keys and values share an axis.
        sorted([(16,), *[(2,), (2, 8), (20,)] * 2]),
    ),
    "pilotnet": Family(
        models.PilotNet,
        models.PilotNetConfig((66, 200)),
        images(66, 200),
        [(10,), (24,), (36,), (48,), (50,), (64,), (64,), (100,)],
    ),
    "driving transformer": Family(
        models.DrivingTransformer,
        models.DrivingTransformerConfig((16, 16), (8, 8), layers=1, heads=2, hidden=9),
        images(16),
        [(2,), (2, 4), (8,), (8,), (9,)],
    ),
    "vit": Family(models.ViT, replace(VISION, num_labels=3), images(8), transformer(2)),
    "vit, fused": Family(
        models.ViT, replace(VISION, num_labels=3, fused_qkv=True), images(8), transformer(2)
    ),
    "bert": Family(
        models.Bert, models.BertConfig(11, 16, 2, 4, 20, 32), IDS, transformer(2, residual=None)
    ),
    "bert, masked": Family(
        models.Bert, models.BertConfig(11, 16, 2, 4, 20, 32, masked_lm=True), IDS, transformer(2)
    ),
    "clip": Family(
        models.CLIP,
        models.CLIPConfig(TEXT, VISION, 8),
        {"input_ids": IDS, "pixel_values": images(8)},
        sorted([*transformer(2), *transformer(2), (8,)]),
    ),
    "t5": Family(
        models.T5,
        T5,
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]},
        # The table of relative positions ties the heads of a stack's layers; the decoder also attends to the encoder.
        sorted([(16,), *[(4,)] * 3, *[(4, 4)] * 6, *[(20,)] * 2]),
    ),
    "gpt2": Family(models.GPT2, models.GPT2Config(11, 16, 16, 2, 4, 20), IDS, transformer(2)),
    "gpt2, stacked": Family(
        models.GPT2,
        models.GPT2Config(11, 16, 16, 2, 4, 20, stacked=True),
        IDS,
        sorted([(2,), (16,), (2, 4), (2, 4, 4), (2, 4, 4), (2, 20)]),
    ),
    "llama": Family(models.Decoder, decoder(), IDS, sorted([(16,), *LLAMA * 2])),
    "llama, stacked": Family(
        models.Decoder,
        decoder(stacked=True),
        IDS,
        sorted([(2,), (16,), *((2, *node) for node in LLAMA)]),
    ),
    "qwen3": Family(
        models.Decoder, decoder(query_key_norm=True, tied=True), IDS, sorted([(16,), *LLAMA * 2])
    ),
}


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
    values = rng.standard_normal(leaf.shape) / max(1, np.prod(leaf.shape[:-1])) ** 0.5
    if leaf.ndim == 1:
        values = 1 + 0.3 * rng.standard_normal(leaf.shape)
    variance = jax.tree_util.keystr(path).rpartition("[")[2].startswith("'var")
    return jnp.asarray(values**2 + 0.5 if variance else values, jnp.float64)


@pytest.mark.parametrize("name", FAMILIES)
def test_relabelling_changes_nothing_and_is_as_free_as_it_can_be(name: str) -> None:
    family = FAMILIES[name]
    module = family.module(replace(family.config, dtype="float64"))
    shapes = jax.eval_shape(lambda key: module.init(key, family.inputs), jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    spec = jm.align.symmetry(module.apply, params, family.inputs)
    assert sorted(spec.shape(node.name) for node in spec.nodes) == family.nodes
    change = jm.align.verify(spec, module.apply, params, (family.inputs,), jax.random.key(1))
    assert change < 1e-10
