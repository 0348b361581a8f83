"""Flax (linen) definitions of model families that people merge.

Each family is a frozen `Config` of plain values and a module that takes it. A module is pure: `module.apply(variables,
inputs)` gives logits or hidden states; images are [batch, height, width, channels].
"""

from jaxmerge.models.activations import ACTIVATIONS
from jaxmerge.models.mlp import MLP, MLPConfig

__all__ = ["ACTIVATIONS", "MLP", "MLPConfig"]
