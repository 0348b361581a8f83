"""Flax (linen) definitions of model families that people merge.

Each family is a frozen `Config` of plain values and a module that takes it. A module is pure:
`module.apply(variables, inputs)` gives logits or hidden states; images are [batch, height, width, channels].

Modules with batch norms have a static argument `train`: `module.apply(variables, images, train=True,
mutable=["batch_stats"])` normalises by the batch and gives the moved running statistics beside the logits.
"""

from jaxmerge.models.activations import ACTIVATIONS
from jaxmerge.models.bert import Bert, BertConfig
from jaxmerge.models.causal import Cache, CausalLM, Layer, empty_cache, layer_function, layers_of
from jaxmerge.models.cct import CCT, CCTConfig
from jaxmerge.models.clip import CLIP, CLIPConfig, CLIPTextConfig, image_features, text_features
from jaxmerge.models.decoder import Decoder, DecoderConfig, LayerKind
from jaxmerge.models.driving_transformer import DrivingTransformer, DrivingTransformerConfig
from jaxmerge.models.generation import generate
from jaxmerge.models.gpt2 import GPT2, GPT2Config
from jaxmerge.models.inverted_residual import InvertedResidualConfig, InvertedResidualNet
from jaxmerge.models.mlp import MLP, MLPConfig
from jaxmerge.models.paths import ScaledLayer, along, in_a_row, scaled
from jaxmerge.models.pilotnet import PilotNet, PilotNetConfig
from jaxmerge.models.pooling import pool
from jaxmerge.models.resnet import ResNet, ResNetConfig
from jaxmerge.models.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rotary,
    YarnScaling,
)
from jaxmerge.models.stacking import stack_layers, stack_layout, unstack_layers
from jaxmerge.models.t5 import T5, T5Config
from jaxmerge.models.vgg import VGG, VGGConfig
from jaxmerge.models.vit import ViT, ViTConfig

__all__ = [
    "ACTIVATIONS",
    "CCT",
    "CLIP",
    "GPT2",
    "MLP",
    "T5",
    "VGG",
    "Bert",
    "BertConfig",
    "CCTConfig",
    "CLIPConfig",
    "CLIPTextConfig",
    "Cache",
    "CausalLM",
    "Decoder",
    "DecoderConfig",
    "DrivingTransformer",
    "DrivingTransformerConfig",
    "DynamicScaling",
    "GPT2Config",
    "InvertedResidualConfig",
    "InvertedResidualNet",
    "Layer",
    "LayerKind",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "MLPConfig",
    "PilotNet",
    "PilotNetConfig",
    "ResNet",
    "ResNetConfig",
    "Rotary",
    "ScaledLayer",
    "T5Config",
    "VGGConfig",
    "ViT",
    "ViTConfig",
    "YarnScaling",
    "along",
    "empty_cache",
    "generate",
    "image_features",
    "in_a_row",
    "layer_function",
    "layers_of",
    "pool",
    "scaled",
    "stack_layers",
    "stack_layout",
    "text_features",
    "unstack_layers",
]
