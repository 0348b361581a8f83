"""The quickstart's network: a Flax module, and the table of its PyTorch names."""

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.tree import Layout, TensorLayout, flatten, nearest, unflatten

PIXELS, HIDDEN, CLASSES = 64, 128, 10
LAYERS = ("fc1", "fc2", "fc3")


class DigitNet(nn.Module):
    """Three dense layers from 64 pixels to the logits of 10 digits."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images float32 [n, 64] -> logits float32 [n, 10]."""
        hidden = nn.relu(self._dense("fc1", HIDDEN)(images))
        hidden = nn.relu(self._dense("fc2", HIDDEN)(hidden))
        return self._dense("fc3", CLASSES)(hidden)

    def _dense(self, name: str, features: int) -> nn.Dense:
        # Accelerators default to less than float32: scores would differ between batch shapes.
        return nn.Dense(features, precision=jax.lax.Precision.HIGHEST, name=name)


NETWORK = DigitNet()

# PyTorch's `nn.Linear` keeps its weight as [out, in], Flax's `nn.Dense` its kernel as [in, out].
LAYOUT = Layout(
    {f"params/{layer}/kernel": TensorLayout((f"{layer}.weight",), axes=(1, 0)) for layer in LAYERS}
    | {f"params/{layer}/bias": TensorLayout((f"{layer}.bias",)) for layer in LAYERS}
)


def logits(variables: Any, images: jax.Array | np.ndarray) -> jax.Array:
    """images float32 [n, 64] -> logits float32 [n, 10]."""
    return cast(jax.Array, NETWORK.apply(variables, images))


def to_checkpoint(variables: Any) -> dict[str, jax.Array]:
    """Flax variables as tensors by PyTorch name.

    Example:
      >>> variables = NETWORK.init(jax.random.key(0), jnp.zeros((1, PIXELS)))
      >>> {name: tensor.shape for name, tensor in to_checkpoint(variables).items()}
      {'fc1.weight': (128, 64), 'fc1.bias': (128,), 'fc2.weight': (128, 128), 'fc2.bias': (128,),
       'fc3.weight': (10, 128), 'fc3.bias': (10,)}
    """
    leaves, _ = flatten(variables)
    # PyTorch lists a layer's weight before its bias.
    return {LAYOUT[path].names[0]: LAYOUT[path].to_checkpoint(leaves[path]) for path in _order()}


def from_checkpoint(tensors: Mapping[str, Any]) -> Any:
    """Tensors by PyTorch name as Flax variables: the inverse of `to_checkpoint`; may be traced.

    Raises:
      ValueError: a tensor is missing or has another shape.
    """
    shapes, definition = _template()
    leaves = {}
    for path, shape in shapes.items():
        tensor = LAYOUT[path]
        name = tensor.names[0]
        if name not in tensors:
            raise ValueError(
                f"the quickstart's network needs tensor {name!r}, which is missing"
                f"{nearest(name, [other for other in tensors if other not in _names()])}"
            )
        expected = tuple(shape[axis] for axis in tensor.axes or range(len(shape)))
        if np.shape(tensors[name]) != expected:
            raise ValueError(
                f"tensor {name!r} of the quickstart's network has shape {list(expected)}, found "
                f"{list(np.shape(tensors[name]))}"
            )
        leaves[path] = tensor.from_checkpoint(jnp.asarray(tensors[name]), shape)
    return unflatten(definition, (leaves[path] for path in shapes))


@cache
def _template() -> tuple[dict[str, tuple[int, ...]], Any]:
    image = jax.ShapeDtypeStruct((1, PIXELS), jnp.float32)
    leaves, definition = flatten(jax.eval_shape(NETWORK.init, jax.random.key(0), image))
    return {path: leaf.shape for path, leaf in leaves.items()}, definition


def _names() -> list[str]:
    return [LAYOUT[path].names[0] for path in _order()]


def _order() -> list[str]:
    return [f"params/{layer}/{leaf}" for layer in LAYERS for leaf in ("kernel", "bias")]
