"""A small model with layers, as files, and recipes run on it."""

import json
from pathlib import Path

import numpy as np

from jaxmerge.converters import load_checkpoint, save_checkpoint
from jaxmerge.recipes import make_plan, parse, run

Tensors = dict[str, np.ndarray]
LAYERS = 3


def draw(seed: int, layers: int = LAYERS) -> Tensors:
    rng = np.random.default_rng(seed)

    def tensor(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": tensor(5, 4)}
    for i in range(layers):
        tensors[f"model.layers.{i}.self_attn.q_proj.weight"] = tensor(4, 4)
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = tensor(6, 4)
    return tensors | {"model.norm.weight": tensor(4), "lm_head.weight": tensor(5, 4)}


def save(folder: Path, tensors: Tensors, layers: int = LAYERS) -> Tensors:
    save_checkpoint(folder, tensors, metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "layer_types": [f"kind {i}" for i in range(layers)],
        "vocab_size": 5,
        "hidden_size": 4,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def merge(recipe: str, out: Path) -> Tensors:
    run(make_plan(parse(recipe), out=out))
    return load_checkpoint(out)
