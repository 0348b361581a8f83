"""Where units are compared: by their weights, by their activations, or by both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

Measure = Literal["correlation", "product"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Space:
    """How similar two units are; made by `weight_space`, `activation_space` and `dual_space`.

    Attributes:
      alpha: float [] or per node a float [], the share of the weights' similarity; traced.
      weights: how weights are compared (static), None for not at all.
      data: whether activations are compared (static).
    """

    alpha: Any
    weights: Measure | None = field(metadata={"static": True})
    data: bool = field(metadata={"static": True})

    def share(self, node: str) -> jax.Array:
        """The share of the weights' similarity for a node."""
        alpha = self.alpha[node] if isinstance(self.alpha, Mapping) else self.alpha
        return jnp.asarray(alpha, jnp.float32)


def weight_space(measure: Measure = "correlation") -> Space:
    """Compares units by their weights.

    Args:
      measure: Pearson's "correlation" over a unit's incoming and outgoing weights, biases and scales (MuDSC), or their
        inner "product" (Git Re-Basin).

    Example:
      >>> weight_space().weights
      'correlation'

    Reference:
      Ainsworth et al., Git Re-Basin: Merging Models modulo Permutation Symmetries, ICLR 2023.
    """
    return Space(jnp.float32(1), measure, False)


def activation_space() -> Space:
    """Compares units by the correlation of their activations.

    Example:
      >>> activation_space().data
      True

    Reference:
      Li et al., Convergent Learning: Do different neural networks learn the same representations?, ICLR 2016.
    """
    return Space(jnp.float32(0), None, True)


def dual_space(alpha: Any = 0.5) -> Space:
    r"""Compares units by weights and activations at once.

    .. math:: S = \alpha S_{weights} + (1 - \alpha) S_{activations}

    Args:
      alpha: scalar, or a mapping with one for every node; traced.

    Example:
      >>> float(dual_space(0.25).alpha)
      0.25

    Reference:
      Xu et al., Training-Free Pretrained Model Merging, CVPR 2024 (MuDSC).
    """
    if isinstance(alpha, Mapping):
        return Space(
            {k: jnp.asarray(v, jnp.float32) for k, v in alpha.items()}, "correlation", True
        )
    return Space(jnp.asarray(alpha, jnp.float32), "correlation", True)
