"""The networks of the section on quality, and their training.

A network maps an image to an embedding; logits are its products with fixed random embeddings of the ten classes, the
same for all networks, so that two of them share their head though each has seen five classes.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmerge as jm

CLASSES = 10
EMBEDDING = 64
BATCH = 50
RATE = 2e-3


class FlatMLP(nn.Module):
    """An MLP of the pixels."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config = jm.models.MLPConfig((784, 128, 128, EMBEDDING))
        return jm.models.MLP(config, name="mlp")(images.reshape(len(images), 784))


@dataclass(frozen=True)
class Network:
    """A network and how it is trained.

    Attributes:
      label: what it is, for people.
      module: from images to embeddings.
      side: of the images in pixels, 28 or 14.
      examples: how many images it is trained on.
      epochs: how often.
      thrift: by how much fewer images it is measured on than others.
      batch_norm: whether it has running statistics.
      grouped: whether groups of channels are normalised together.
    """

    label: str
    module: nn.Module
    side: int
    examples: int
    epochs: int
    thrift: int = 1
    batch_norm: bool = False
    grouped: bool = False

    def apply(self, variables: Any, images: jax.Array) -> jax.Array:
        """Embeddings in evaluation."""
        found: jax.Array = self.module.apply(variables, images)
        return found

    def apply_train(self, variables: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        """Embeddings in training, and the moved running statistics if there are any."""
        if not self.batch_norm:
            return self.apply(variables, images), {}
        return self.module.apply(variables, images, train=True, mutable=["batch_stats"])  # type: ignore[return-value]


def _resnet20(norm: Any) -> nn.Module:
    config = jm.models.ResNetConfig((3, 3, 3), (16, 32, 64), EMBEDDING, norm=norm, channels=1)
    return jm.models.ResNet(config)


_VIT = jm.models.ViTConfig(
    (28, 28), (7, 7), 64, 3, 4, 128, channels=1, num_labels=EMBEDDING, pooling="average"
)

NETWORKS: Mapping[str, Network] = {
    "mlp": Network("MLP 784-128-128", FlatMLP(), 28, 3000, 10),
    "resnet20-batch": Network(
        "ResNet20, BatchNorm", _resnet20("batch"), 14, 1000, 6, thrift=2, batch_norm=True
    ),
    "resnet20-group": Network(
        "ResNet20, GroupNorm", _resnet20("group"), 14, 1000, 6, thrift=2, grouped=True
    ),
    "vit": Network("ViT, 3 blocks of 64", jm.models.ViT(_VIT), 28, 3000, 10),
}


def flat_groups(images: jax.Array, variables: Any) -> jm.align.PermutationSpec:
    """The symmetry that ResNet20 would have if its groups of channels were not normalised together: too large."""
    return jm.align.symmetry(_resnet20("layer").apply, variables, images)


def class_embeddings(seed: int) -> jax.Array:
    """[classes, embedding], of length 1."""
    drawn = np.random.default_rng(seed).standard_normal((CLASSES, EMBEDDING))
    return jnp.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), jnp.float32)


def train(
    network: Network, key: jax.Array, images: jax.Array, labels: jax.Array, embeddings: jax.Array
) -> Any:
    """Trains from random weights by Adam with a cosine schedule.

    Args:
      labels: int [n], positions in `embeddings`.
      embeddings: [classes of the task, embedding].
    """
    count = len(images) // BATCH
    start, shuffle = jax.random.split(key)
    state = _start(network, count, start, images[:1])
    for epoch in range(network.epochs):
        order = jax.random.permutation(jax.random.fold_in(shuffle, epoch), len(images))
        for batch in order[: count * BATCH].reshape(count, BATCH):
            state = _step(network, count, state, images[batch], labels[batch], embeddings)
    params, rest, _ = state
    return {"params": params, **rest}


def _adam(network: Network, count: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(RATE, network.epochs * count))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(network: Network, count: int, key: jax.Array, images: jax.Array) -> Any:
    variables = dict(network.module.init(key, images))
    params = variables.pop("params")
    return params, variables, _adam(network, count).init(params)


# A loop of calls, not a scan: within loops XLA computes the gradients of kernels many times slower on CPUs.
@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _step(
    network: Network,
    count: int,
    state: Any,
    images: jax.Array,
    labels: jax.Array,
    embeddings: jax.Array,
) -> Any:
    params, rest, moments = state

    def loss(params: Any) -> Any:
        found, moved = network.apply_train({"params": params, **rest}, images)
        logits = found @ embeddings.T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), moved

    gradient, rest = jax.grad(loss, has_aux=True)(params)
    updates, moments = _adam(network, count).update(gradient, moments, params)
    return optax.apply_updates(params, updates), rest, moments
