"""ZipIt's greedy merging of units, and k-means from where it ends."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class _State(NamedTuple):
    """Where the merging stands; a cluster is known by its first unit.

    Attributes:
      similarity: [units, units], between clusters where both are alive.
      blocked: bool [units, units], pairs whose model has used up its budget.
      alive: bool [units], whether a unit still stands for a cluster.
      origin: int32 [units], the model of a cluster's first unit.
      budget: int32 [models], the merges within a model that are left.
      labels: int32 [units], the cluster of each unit.
    """

    similarity: jax.Array
    blocked: jax.Array
    alive: jax.Array
    origin: jax.Array
    budget: jax.Array
    labels: jax.Array


def greedy(similarity: Any, models: int, a: Any = 0.5, b: Any = 1.0) -> jax.Array:
    r"""Merges the units of several models, most similar pair first, until as many are left as one model has.

    .. math:: S_{\{i, j\} k} = a \min(S_{ik}, S_{jk})

    is the similarity of what has been merged to all else: for a small `a` it is rarely merged again. Units of one model
    merge with each other too, at most :math:`\lfloor b\, n (N - 1) / N \rfloor` times in each model. Where the budgets
    allow no further pair before the count is reached, they are passed over.

    Args:
      similarity: [models * n, models * n] floats, symmetric, the units of model after model.
      models: how many there are, static.
      a: float [], the factor; traced.
      b: float [], the share of merges that may be within models; traced.

    Returns:
      int32 [models * n], the merged unit in [0, n) that each becomes part of, numbered by their first parts. Runs under
      vmap.

    Example:
      >>> s = jnp.array([[1., .2, .1, .9], [.2, 1., .8, .1], [.1, .8, 1., .3], [.9, .1, .3, 1.]])
      >>> greedy(s, 2).tolist()
      [0, 1, 1, 0]

    Reference:
      Stoica et al., ZipIt! Merging Models from Different Tasks without Training, ICLR 2024.
    """
    similarity = jnp.asarray(similarity)
    count = similarity.shape[0]
    kept = count // models
    removed = count - kept
    origin = jnp.arange(count, dtype=jnp.int32) // kept
    budget = jnp.floor(removed // models * jnp.asarray(b) + 1e-4).astype(jnp.int32)
    itself = jnp.eye(count, dtype=bool)

    def merge(_: int, state: _State) -> _State:
        pairs = state.alive[:, None] & state.alive[None, :] & ~itself
        allowed = pairs & ~state.blocked
        allowed = jnp.where(jnp.any(allowed), allowed, pairs)
        best = jnp.argmax(jnp.where(allowed, state.similarity, -jnp.inf))
        one, other = best // count, best % count
        first, second = jnp.minimum(one, other), jnp.maximum(one, other)
        similar = state.similarity
        similar = similar.at[:, first].set(a * jnp.minimum(similar[:, first], similar[:, second]))
        similar = similar.at[first].set(a * jnp.minimum(similar[first], similar[second]))
        blocked = state.blocked
        blocked = blocked.at[:, first].set(blocked[:, first] | blocked[:, second])
        blocked = blocked.at[first].set(blocked[first] | blocked[second])
        mine = state.origin[first]
        within = mine == state.origin[second]
        left = state.budget.at[mine].add(-within.astype(jnp.int32))
        same = state.origin == mine
        spent = within & (left[mine] <= 0)
        return _State(
            similar,
            blocked | (spent & same[:, None] & same[None, :]),
            state.alive.at[second].set(False),
            state.origin,
            left,
            jnp.where(state.labels == second, first, state.labels).astype(jnp.int32),
        )

    start = _State(
        similarity,
        (budget <= 0) & (origin[:, None] == origin[None, :]),
        jnp.ones(count, bool),
        origin,
        jnp.full(models, budget),
        jnp.arange(count, dtype=jnp.int32),
    )
    final = jax.lax.fori_loop(0, removed, merge, start)
    return (jnp.cumsum(final.alive) - 1).astype(jnp.int32)[final.labels]


def kmeans(similarity: Any, labels: jax.Array, clusters: int, steps: int = 50) -> jax.Array:
    r"""Moves units to the cluster whose mean is nearest, from given clusters, until that changes nothing.

    .. math:: d(i, c) = S_{ii} - \frac{2}{|c|} \sum_{j \in c} S_{ij} + \frac{1}{|c|^2} \sum_{j, k \in c} S_{jk}

    is the squared distance from a cluster's mean in the space whose inner products are the similarities. The unit that
    is nearest to a cluster's mean stays in it: no cluster runs empty.

    Args:
      similarity: [units, units], inner products or correlations.
      labels: int32 [units] in [0, clusters), every cluster having one unit at least.
      clusters: how many, static.
      steps: the most rounds, static.

    Returns:
      int32 [units].

    Example:
      >>> x = jnp.array([0.0, 4.0, 0.1, 4.2])
      >>> kmeans(x[:, None] * x[None, :], jnp.array([0, 1, 1, 1]), 2).tolist()
      [0, 1, 0, 1]

    Reference:
      Dhillon, Guan and Kulis, Kernel k-means, Spectral Clustering and Normalized Cuts, KDD 2004.
    """
    similarity = jnp.asarray(similarity)

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        labels, _, turn = carry
        member = jax.nn.one_hot(labels, clusters, dtype=similarity.dtype)
        member = member / jnp.sum(member, 0, keepdims=True)
        to = jnp.matmul(similarity, member, precision=jax.lax.Precision.HIGHEST)
        spread = jnp.sum(member * to, 0)
        distance = jnp.diagonal(similarity)[:, None] - 2 * to + spread[None, :]
        own = jnp.where(labels[:, None] == jnp.arange(clusters)[None, :], distance, jnp.inf)
        nearest = jnp.argmin(distance, 1).astype(jnp.int32)
        nearest = nearest.at[jnp.argmin(own, 0)].set(jnp.arange(clusters, dtype=jnp.int32))
        return nearest, jnp.any(nearest != labels), turn + 1

    start = (jnp.asarray(labels, jnp.int32), jnp.bool_(True), jnp.int32(0))
    found: jax.Array = jax.lax.while_loop(lambda c: c[1] & (c[2] < steps), step, start)[0]
    return found
