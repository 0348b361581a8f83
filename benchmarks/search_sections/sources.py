"""Networks of unlike blocks on real data: a base and its experts, trained here, for merges to be searched over."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from alignment_sections.images import halved, load
from driving import drives, seen

from jaxmerge.models.cct import CCT, CCTConfig
from jaxmerge.models.driving_transformer import DrivingTransformer, DrivingTransformerConfig

BATCH = 64
VALIDATION = 128
"""Examples of each task that searches look at."""

RATE = 2e-3


@dataclass(frozen=True)
class Split:
    """Inputs float32 [n, height, width, channels] and targets [n] of one task."""

    inputs: np.ndarray
    targets: np.ndarray

    def part(self, start: int, stop: int) -> "Split":
        return Split(self.inputs[start:stop], self.targets[start:stop])


@dataclass(frozen=True)
class Task:
    """What a source is trained on, what a search may look at, and what is read once at the end."""

    name: str
    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class Problem:
    """A base, an expert for each task, and how merges are scored.

    Attributes:
      name: what it is.
      apply_fn: (params, inputs) -> outputs.
      score: (outputs, targets) -> float [n], larger is better, positive in the mean.
      tasks: what is to be kept.
      base: parameters.
      experts: one for each task.
      training: what was trained how long.
    """

    name: str
    apply_fn: Callable[[Any, jax.Array], jax.Array]
    score: Callable[[jax.Array, jax.Array], jax.Array]
    tasks: tuple[Task, ...]
    base: Any
    experts: tuple[Any, ...]
    training: str


def images(seed: int) -> Problem:
    """A compact convolutional transformer: Fashion-MNIST's ten classes and ten digits, one head of twenty."""
    config = CCTConfig((14, 14), (16, 32), layers=3, heads=2, hidden=64, classes=20, channels=1)
    tasks = []
    for i, dataset in enumerate(("fashion-mnist", "mnist")):
        train, test = (
            Split(halved(part.images), part.labels + 10 * i) for part in load(dataset, None)
        )
        order = np.random.default_rng(0).permutation(len(train.targets))
        train = Split(train.inputs[order], train.targets[order])
        tasks.append(
            Task(
                dataset,
                train.part(0, 6000),
                train.part(6000, 6000 + VALIDATION),
                test.part(0, 2000),
            )
        )

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return _trained(
        "images: CCT, Fashion-MNIST and MNIST", CCT(config), tasks, loss, _right, seed, (1, 5)
    )


def driving(seed: int) -> Problem:
    """Convolutions and a transformer that steer: by day, and in the inverted colours of a night."""
    config = DrivingTransformerConfig(
        (24, 24), (8, 16, 32), norm="none", layers=2, heads=2, hidden=64
    )
    rounds = drives(range(18))
    tasks = []
    for look in ("day", "night"):
        splits = []
        for chosen in (rounds[:10], rounds[10:14], rounds[14:]):
            frames = np.concatenate([seen(one.frames, look) for one in chosen]) - 0.5
            splits.append(Split(frames, np.concatenate([one.steering for one in chosen])))
        train, validation, test = splits
        every = np.random.default_rng(0).permutation(len(validation.targets))[:VALIDATION]
        validation = Split(validation.inputs[every], validation.targets[every])
        tasks.append(Task(look, train, validation, test))

    def loss(commands: jax.Array, steering: jax.Array) -> jax.Array:
        return jnp.mean((commands[:, 0] - steering) ** 2)

    return _trained(
        "driving: CNN + transformer, day and night",
        DrivingTransformer(config),
        tasks,
        loss,
        _near,
        seed,
        (4, 16),
    )


def _right(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, -1) == labels).astype(jnp.float32)


def _near(commands: jax.Array, steering: jax.Array) -> jax.Array:
    """1 / (1 + normalised mean squared error), the same for all frames."""
    error = jnp.mean((commands[:, 0] - steering) ** 2) / jnp.var(steering)
    return jnp.broadcast_to(1 / (1 + error), steering.shape)


def _trained(
    name: str,
    model: Any,
    tasks: list[Task],
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    score: Callable[[jax.Array, jax.Array], jax.Array],
    seed: int,
    epochs: tuple[int, int],
) -> Problem:
    """Trains the base on a little of all tasks, and from it an expert on each."""
    together = Split(
        np.concatenate([task.train.inputs for task in tasks]),
        np.concatenate([task.train.targets for task in tasks]),
    )
    params = model.init(jax.random.key(seed), jnp.asarray(together.inputs[:1]))
    fit = functools.partial(_fit, model.apply, loss)
    base = fit(params, together, epochs[0], seed)
    experts = tuple(fit(base, task.train, epochs[1], seed + 1 + i) for i, task in enumerate(tasks))
    return Problem(
        name, model.apply, score, tuple(tasks), base, experts,
        f"base: {epochs[0]} epochs of {len(together.targets)} examples of both tasks; experts: {epochs[1]} epochs of "
        f"their own; Adam, rate {RATE:g} falling to 0, batches of {BATCH}",
    )  # fmt: skip


def _fit(
    apply_fn: Callable[[Any, jax.Array], jax.Array],
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    params: Any,
    data: Split,
    epochs: int,
    seed: int,
) -> Any:
    steps = len(data.targets) // BATCH
    optimiser = optax.adam(optax.cosine_decay_schedule(RATE, steps * epochs))
    inputs, targets = jnp.asarray(data.inputs), jnp.asarray(data.targets)

    def step(carry: Any, chosen: jax.Array) -> tuple[Any, None]:
        params, state = carry
        gradient = jax.grad(lambda p: loss(apply_fn(p, inputs[chosen]), targets[chosen]))(params)
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(targets))[: steps * BATCH] for _ in range(epochs)])
    batches = jnp.asarray(order.reshape(-1, BATCH))
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))(
        (params, optimiser.init(params))
    )
    return params
