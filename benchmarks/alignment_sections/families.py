"""Every family of models: what its derived symmetry costs and how free it is, and what relabellings change."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from report import Table

import jaxmerge as jm
from alignment_sections import Options, verdict
from jaxmerge.models.decoder import LayerKind
from jaxmerge.models.inverted_residual import Block
from jaxmerge.models.pilotnet import Convolution

LIMIT = 1e-10
TRIALS = 20


def run(options: Options) -> Iterator[Table]:
    table = Table(
        "Every family's symmetry",
        {
            "model": "",
            "parameters": "d",
            "s to derive": ".2f",
            "nodes": "d",
            "units": "d",
            "largest change": ".0e",
            "holds": "",
        },
        [
            "Small models with random parameters, float64. nodes: sets of units that may be permuted; units: how many",
            f"in all. Largest change of the outputs over {TRIALS} random relabellings, relative to the largest output;",
            f"limit {LIMIT:.0e}.",
        ],
    )
    table.start()
    for name, (model, inputs) in _models(np.random.default_rng(options.seed)).items():
        table.add(model=name, **_row(model, inputs, options.seed))
    yield table


def _row(model: Any, inputs: Any, seed: int) -> dict[str, Any]:
    # Decoders normalise in float32 whatever their dtype, in which rounding would hide small errors.
    with jax.enable_x64(True), patch.object(jnp, "float32", jnp.float64):
        model = model.clone(config=dataclasses.replace(model.config, dtype="float64"))
        inputs = jax.tree.map(jnp.asarray, inputs)
        params = _random(jax.eval_shape(model.init, jax.random.key(0), inputs), seed)
        started = time.perf_counter()
        spec = jm.align.symmetry(model.apply, params, inputs)
        seconds = time.perf_counter() - started
        key = jax.random.key(seed)
        change = float(jm.align.verify(spec, model.apply, params, inputs, key, trials=TRIALS))
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "s to derive": seconds,
        "nodes": len(spec.free()),
        "units": sum(int(np.prod(spec.shape(node.name))) for node in spec.free()),
        "largest change": change,
        "holds": verdict(change < LIMIT, f"{change:.0e}"),
    }


def _random(shapes: Any, seed: int) -> Any:
    """Random values everywhere: none that a relabelling would not show."""
    rng = np.random.default_rng(seed)
    leaves, definition = jax.tree.flatten_with_path(shapes)
    drawn = []
    for path, leaf in leaves:
        centre = 1.0 if "scale" in str(path[-1]) or "var" in str(path[-1]) else 0.0
        spread = 0.2 if len(leaf.shape) > 1 else 0.1
        drawn.append(jnp.asarray(centre + spread * rng.standard_normal(leaf.shape), jnp.float64))
    return jax.tree.unflatten(definition, drawn)


def _models(rng: np.random.Generator) -> dict[str, tuple[Any, Any]]:
    m = jm.models
    images = rng.standard_normal((2, 8, 8, 3))
    tokens = rng.integers(0, 11, (2, 5))
    both = {"pixel_values": images, "input_ids": tokens}

    def resnet(norm: str) -> Any:
        return m.ResNet(m.ResNetConfig((1, 1), (4, 6), 3, norm=norm, groups=2))

    def decoder(stacked: bool) -> Any:
        layers = (LayerKind(),) * 2
        return m.Decoder(m.DecoderConfig(11, 16, layers, 4, 2, 4, 10, 16, stacked=stacked))

    def vit(fused: bool) -> Any:
        return m.ViT(m.ViTConfig((8, 8), (4, 4), 8, 1, 2, 12, num_labels=3, fused_qkv=fused))

    blocks = (Block(6, 4, 1, 3), Block(12, 4, 1, 3), Block(16, 8, 2, 5))
    convolutions = (Convolution(4, 3, 2), Convolution(6, 3, 1))
    text = m.CLIPTextConfig(11, 8, 1, 2, 12, 8)
    vision = m.ViTConfig((8, 8), (4, 4), 12, 1, 2, 10)
    return {
        "MLP": (m.MLP(m.MLPConfig((3, 7, 5, 3))), images[0, 0]),
        "VGG": (m.VGG(m.VGGConfig(((4,), (6, 5)), (7,), 3, 2)), images),
        "ResNet, BatchNorm": (resnet("batch"), images),
        "ResNet, LayerNorm": (resnet("layer"), images),
        "ResNet, GroupNorm": (resnet("group"), images),
        "MobileNet": (m.InvertedResidualNet(m.InvertedResidualConfig(6, blocks, 10, 3)), images),
        "ViT": (vit(False), images),
        "ViT, fused qkv": (vit(True), images),
        "CCT": (
            m.CCT(m.CCTConfig((8, 8), (6, 8), layers=1, heads=2, hidden=12, classes=3)),
            images,
        ),
        "BERT": (m.Bert(m.BertConfig(11, 8, 1, 2, 12, 8, masked_lm=True)), tokens),
        "GPT-2": (m.GPT2(m.GPT2Config(11, 8, 8, 2, 2, 12)), tokens),
        "GPT-2, scanned": (m.GPT2(m.GPT2Config(11, 8, 8, 2, 2, 12, stacked=True)), tokens),
        "Llama": (decoder(False), tokens),
        "Llama, scanned": (decoder(True), tokens),
        "T5": (
            m.T5(m.T5Config(11, 8, 4, 12, 1, 1, 2)),
            {"input_ids": tokens, "decoder_input_ids": tokens},
        ),
        "CLIP": (m.CLIP(m.CLIPConfig(text, vision, 6)), both),
        "PilotNet": (m.PilotNet(m.PilotNetConfig((8, 8), convolutions, (7, 5), 2)), images),
        "driving transformer": (
            m.DrivingTransformer(
                m.DrivingTransformerConfig((8, 8), (4, 8), "batch", 2, 1, 2, 12, 2)
            ),
            images,
        ),
    }
