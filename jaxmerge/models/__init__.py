"""Flax (linen) definitions of model families that people merge.

Each family is a frozen `Config` of plain values and a module that takes it. A module is pure: `module.apply(variables,
inputs)` gives logits or hidden states; images are [batch, height, width, channels].
"""

from jaxmerge.models.activations import ACTIVATIONS
from jaxmerge.models.bert import Bert, BertConfig
from jaxmerge.models.clip import CLIP, CLIPConfig, CLIPTextConfig, image_features, text_features
from jaxmerge.models.mlp import MLP, MLPConfig
from jaxmerge.models.pooling import pool
from jaxmerge.models.t5 import T5, T5Config
from jaxmerge.models.vit import ViT, ViTConfig

__all__ = [
    "ACTIVATIONS",
    "CLIP",
    "MLP",
    "T5",
    "Bert",
    "BertConfig",
    "CLIPConfig",
    "CLIPTextConfig",
    "MLPConfig",
    "T5Config",
    "ViT",
    "ViTConfig",
    "image_features",
    "pool",
    "text_features",
]
