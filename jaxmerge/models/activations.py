"""Activation functions by the names that configurations give them."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import flax.linen as nn
import jax

Activation = Callable[[jax.Array], jax.Array]


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "relu": nn.relu,
        "relu6": nn.relu6,
        "elu": nn.elu,
        "celu": nn.celu,
        "gelu": partial(nn.gelu, approximate=False),
        "gelu_tanh": partial(nn.gelu, approximate=True),
        "quick_gelu": quick_gelu,
        "silu": nn.silu,
        "tanh": nn.tanh,
        "sigmoid": nn.sigmoid,
    }
)
"""As PyTorch computes them: "gelu" is the exact one, "gelu_tanh" its approximation."""
