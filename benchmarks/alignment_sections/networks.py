"""The networks of the section on quality, and their training in one program.

A network maps an image to an embedding; logits are its products with fixed random embeddings of the ten classes, the
same for all networks, so that two of them share their head though each has seen five classes.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmerge as jm

CLASSES = 10
EMBEDDING = 64
BATCH = 100
RATE = 1e-3


class FlatMLP(nn.Module):
    """An MLP of the pixels."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config = jm.models.MLPConfig((784, 128, 128, EMBEDDING))
        return jm.models.MLP(config, name="mlp")(images.reshape(len(images), 784))


def network(name: str) -> nn.Module:
    """One of "mlp" (two hidden layers of 128), "resnet20" (16-32-64, GroupNorm) and "vit" (4 blocks of 64)."""
    if name == "mlp":
        return FlatMLP()
    if name == "resnet20":
        config = jm.models.ResNetConfig(
            (3, 3, 3), (16, 32, 64), EMBEDDING, norm="group", channels=1
        )
        return jm.models.ResNet(config)
    config = jm.models.ViTConfig(
        (28, 28), (7, 7), 64, 4, 4, 128, channels=1, num_labels=EMBEDDING, pooling="average"
    )
    return jm.models.ViT(config)


def class_embeddings(seed: int) -> jax.Array:
    """[classes, embedding], of length 1."""
    drawn = np.random.default_rng(seed).standard_normal((CLASSES, EMBEDDING))
    return jnp.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), jnp.float32)


@functools.partial(jax.jit, static_argnames=("model", "epochs"))
def train(
    model: nn.Module,
    epochs: int,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    embeddings: jax.Array,
) -> Any:
    """Trains from random weights by Adam with a cosine schedule.

    Args:
      labels: int [n], positions in `embeddings`.
      embeddings: [classes of the task, embedding].
    """
    count = len(images) // BATCH
    adam = optax.adam(optax.cosine_decay_schedule(RATE, epochs * count))
    start, shuffle = jax.random.split(key)
    params = model.init(start, images[:1])

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits = model.apply(params, images[batch]) @ embeddings.T
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]))

    def step(state: Any, batch: jax.Array) -> Any:
        params, moments = state
        updates, moments = adam.update(jax.grad(loss)(params, batch), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    def epoch(state: Any, key: jax.Array) -> Any:
        batches = jax.random.permutation(key, count * BATCH).reshape(count, BATCH)
        return jax.lax.scan(step, state, batches)

    state = (params, adam.init(params))
    (params, _), _ = jax.lax.scan(epoch, state, jax.random.split(shuffle, epochs))
    return params
