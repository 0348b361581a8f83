"""Trains what the quickstart merges: a base, and experts that start from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmerge.data import Digits
from jaxmerge.quickstart.network import NETWORK, logits

GROUPS = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
BATCH = 32


class Sources(NamedTuple):
    """What training gives, as Flax variables.

    Attributes:
      base: trained for a few steps on all digits.
      experts: one per group, fine-tuned from the base on that group's digits alone.
      joint: fine-tuned like an expert, but on all digits: what no merge is given.
    """

    base: Any
    experts: tuple[Any, ...]
    joint: Any


def train_sources(
    digits: Digits,
    *,
    seed: int,
    base_steps: int,
    expert_steps: int,
    base_rate: float = 1e-3,
    expert_rate: float = 5e-4,
) -> Sources:
    """Trains the base, then all experts side by side (vmap), in one compiled program.

    Args:
      digits: the training split.
      seed: of the initial parameters and the batches.
      base_steps, expert_steps: batches of 32 images.
      base_rate, expert_rate: Adam's learning rates.
    """
    draw = np.random.default_rng(seed)
    everything = tuple(range(10))
    base_rows = _rows(digits, everything, base_steps, draw)
    rows = np.stack([_rows(digits, group, expert_steps, draw) for group in (*GROUPS, everything)])
    base, (*experts, joint) = _train_all(
        jax.random.key(seed), digits, base_rows, rows, base_rate, expert_rate
    )
    return Sources(base, tuple(experts), joint)


def group_name(group: tuple[int, ...]) -> str:
    """A group as tables show it.

    >>> group_name((4, 5, 6))
    '4-6'
    """
    return f"{group[0]}-{group[-1]}"


@jax.jit
def _train_all(
    key: jax.Array,
    digits: Digits,
    base_rows: jax.Array,
    rows: jax.Array,
    base_rate: float,
    expert_rate: float,
) -> tuple[Any, list[Any]]:
    base = _train(NETWORK.init(key, digits.images[:1]), digits, base_rows, base_rate)
    tuned = jax.vmap(_train, in_axes=(None, None, 0, None))(base, digits, rows, expert_rate)
    return base, [jax.tree.map(lambda x, i=i: x[i], tuned) for i in range(len(rows))]


def _train(variables: Any, digits: Digits, rows: jax.Array, rate: float) -> Any:
    """One step of Adam per row; rows [steps, BATCH] say which images it sees."""
    optimizer = optax.adam(rate)

    def step(carry: tuple[Any, Any], batch: jax.Array) -> tuple[tuple[Any, Any], None]:
        variables, state = carry
        gradient = jax.grad(_loss)(variables, digits.images[batch], digits.labels[batch])
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(variables, updates), state), None

    return jax.lax.scan(step, (variables, optimizer.init(variables)), rows)[0][0]


def _loss(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(variables, images), labels)
    return jnp.mean(losses)


def _rows(
    digits: Digits, group: tuple[int, ...], steps: int, draw: np.random.Generator
) -> np.ndarray:
    """int64 [steps, BATCH]: the images of each batch, from one group's alone."""
    return draw.choice(np.flatnonzero(np.isin(digits.labels, group)), (steps, BATCH))
