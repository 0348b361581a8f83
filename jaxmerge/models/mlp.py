"""Multi-layer perceptron."""

from dataclasses import dataclass

import flax.linen as nn
import jax

from jaxmerge.models.activations import ACTIVATIONS
from jaxmerge.models.layers import dense


@dataclass(frozen=True)
class MLPConfig:
    """What an `MLP` is.

    Attributes:
      features: widths from the inputs through the hidden layers to the outputs; two or more.
      activation: a key of `ACTIVATIONS`, after every layer but the last.
      dtype: of the computation; the parameters keep their own.
    """

    features: tuple[int, ...]
    activation: str = "relu"
    dtype: str = "float32"


class MLP(nn.Module):
    """Dense layers with an activation between them.

    Example:
      >>> import jax.numpy as jnp
      >>> model = MLP(MLPConfig((4, 8, 3)))
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4)))
      >>> model.apply(variables, jnp.ones((2, 4))).shape
      (2, 3)
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """inputs [..., features[0]] -> outputs [..., features[-1]]."""
        hidden = inputs.astype(self.config.dtype)
        for i, width in enumerate(self.config.features[1:]):
            if i:
                hidden = ACTIVATIONS[self.config.activation](hidden)
            hidden = dense(width, name=f"dense_{i}", dtype=self.config.dtype)(hidden)
        return hidden
