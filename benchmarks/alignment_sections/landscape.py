"""Losses of both tasks between two networks and around their merge."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmerge as jm
from alignment_sections.images import Images
from alignment_sections.merging import finished
from alignment_sections.networks import CLASSES, Network

POINTS = 9
GRID = 7
REACH = 1.5
"""The plane reaches so many times as far as the networks lie from their merge."""
LOW = float(np.log(5)) / 2
"""A task's loss is low where it is at most half of that of guessing among its five classes."""


def between(network: Network, a: Any, b: Any, given: dict[str, jax.Array]) -> np.ndarray:
    """[POINTS, tasks], the losses on the straight line; `given` is what `examples` gives."""
    ends = (_beside(one, given) for one in (a, b))
    _, losses = jm.fusion.path_losses(task_losses(network), *ends, points=POINTS)
    return np.asarray(losses)


def around(network: Network, a: Any, b: Any, given: dict[str, jax.Array], seed: int) -> np.ndarray:
    """[GRID, GRID, tasks], the losses over a plane through the mean of a and b, which is its middle.

    Along the columns it goes to a and b, along the rows in a random direction whose part in each leaf is as long as
    that of the way to a.
    """
    mean = jax.tree.map(lambda one, other: (one + other) / 2, a, b)
    leaves, definition = jax.tree.flatten(mean)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = definition.unflatten(
        jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)
    )
    aside = jax.tree.map(
        lambda centre, end, d: (
            centre + d * jnp.linalg.norm((end - centre).ravel()) / jnp.linalg.norm(d.ravel())
        ),
        mean,
        a,
        drawn,
    )
    steps = jnp.linspace(-REACH, REACH, GRID)
    corners = (_beside(one, given) for one in (mean, a, aside))
    return np.asarray(jm.fusion.plane_losses(task_losses(network), *corners, steps, steps))


def overlap(losses: Any) -> float:
    """Percent that both tasks' regions of low loss share of what either covers, on a grid [rows, columns, tasks]."""
    low = np.asarray(losses) <= LOW
    either = np.sum(low.any(-1))
    return 100 * float(np.sum(low.all(-1)) / either) if either else 0.0


def barrier(losses: Any) -> float:
    """How far the tasks' mean loss on a line [points, tasks] rises above the line between its ends."""
    mean = np.asarray(losses).mean(-1)
    return float(np.max(mean - np.linspace(mean[0], mean[-1], len(mean))))


@functools.cache
def task_losses(network: Network) -> Callable[[dict[str, Any]], jax.Array]:
    """The loss of a model to [tasks]: each task's mean cross-entropy among its own classes.

    Beside its variables the model holds what `examples` gives and the images of its running statistics: arguments, not
    constants, so that all pairs of networks share a program.
    """

    def losses(model: dict[str, Any]) -> jax.Array:
        variables = finished(network, model["variables"], model["statistics"])
        logits = network.apply(variables, model["images"]) @ model["embeddings"].T
        among = jnp.where(model["own"] > 0.5, logits, -1e9)
        each = optax.softmax_cross_entropy(among, model["labels"])
        return each @ model["tasks"] / jnp.sum(model["tasks"], 0)

    return losses


def examples(
    images: Images, tasks: Sequence[np.ndarray], embeddings: jax.Array, x: jax.Array
) -> dict[str, jax.Array]:
    """What losses are taken on.

    Args:
      images: of both tasks.
      tasks: each one's classes.
      embeddings: of the classes.
      x: the images that running statistics are computed on.
    """
    members = np.stack([np.isin(images.labels, task) for task in tasks], 1)
    classes = np.stack([np.isin(np.arange(CLASSES), task) for task in tasks])
    return {
        "images": jnp.asarray(images.images),
        "labels": jax.nn.one_hot(images.labels, CLASSES),
        "tasks": jnp.asarray(members, jnp.float32),
        "own": jnp.asarray(members.astype(np.float32) @ classes.astype(np.float32)),
        "embeddings": embeddings,
        "statistics": x,
    }


def _beside(variables: Any, given: dict[str, jax.Array]) -> dict[str, Any]:
    return {"variables": variables, **given}
