"""Successive halving: few examples for everybody, more for the survivors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Rung(NamedTuple):
    """A step of successive halving.

    Attributes:
      candidates: how many are still in.
      examples: how many examples each of them has seen after it, those of earlier rungs included.
    """

    candidates: int
    examples: int


class Halving(NamedTuple):
    """What successive halving found about P candidates.

    Attributes:
      place: int32 [P], 0 for the best: those that saw more examples come first, then those of smaller loss. A fitness
        for strategies that look at ranks alone.
      loss: float32 [P], the mean over the examples that a candidate saw. Losses of candidates that saw different
        examples are not to be compared.
      seen: int32 [P], how many examples it saw.
    """

    place: jax.Array
    loss: jax.Array
    seen: jax.Array


def rungs(candidates: int, examples: int, *, first: int, factor: float = 2.0) -> tuple[Rung, ...]:
    """Plans: a `factor`-th survives each rung and has then seen `factor` times the examples.

    Args:
      candidates: P, how many there are.
      examples: N, how many there are; the last rung's survivors see them all.
      first: how many everybody sees.
      factor: above 1.

    Returns:
      The rungs in order.

    Raises:
      ValueError: nothing to do, more examples at first than there are, a factor of 1 or less.

    Example:
      >>> rungs(8, 40, first=10)
      (Rung(candidates=8, examples=10), Rung(candidates=4, examples=20), Rung(candidates=2, examples=40))
    """
    if candidates < 1 or not 1 <= first <= examples:
        raise ValueError(
            f"successive halving needs candidates and 1 <= first <= examples; found {candidates} "
            f"candidates, first {first}, {examples} examples"
        )
    if not factor > 1:
        raise ValueError(f"the factor must exceed 1, found {factor}")
    plan = [Rung(candidates, first)]
    while plan[-1].examples < examples:
        i = len(plan)
        seen = min(examples, max(plan[-1].examples + 1, math.floor(first * factor**i)))
        plan.append(Rung(max(1, math.ceil(candidates / factor**i)), seen))
    return tuple(plan)


def cost(plan: Sequence[Rung]) -> int:
    """How many times a candidate meets an example; without halving it were P times N.

    >>> cost(rungs(8, 40, first=10))
    160
    """
    total, before = 0, 0
    for rung in plan:
        total += rung.candidates * (rung.examples - before)
        before = rung.examples
    return total


def successive_halving(
    evaluate: Callable[[Any, Any], jax.Array],
    candidates: Any,
    examples: Any,
    plan: Sequence[Rung],
    *,
    chunk: int | None = None,
) -> Halving:
    """Ranks candidates, most of them by a part of the examples.

    Pure; may be compiled. The examples are taken in the order given: shuffle them first.

    Args:
      evaluate: (candidate, examples [m, ...]) -> losses [m], traced; less is better.
      candidates: a pytree of arrays [P, ...].
      examples: a pytree of arrays [N, ...].
      plan: made by `rungs(P, N, ...)`; static.
      chunk: how many candidates are evaluated at once; None: all.

    Returns:
      Places, losses and counts. A loss that is not finite counts as worse than all others of its rung.

    Raises:
      ValueError: a plan for other numbers of candidates or examples.

    Example:
      >>> targets = jnp.array([1.0, 2.0, 3.0, 2.0])
      >>> found = successive_halving(
      ...     lambda guess, seen: (guess - seen) ** 2, jnp.array([9.0, 2.0, 5.0]), targets, rungs(3, 4, first=2))
      >>> found.place.tolist(), found.seen.tolist()
      ([2, 0, 1], [2, 4, 4])

    Reference:
      Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization, AISTATS 2016.
    """
    count = jax.tree.leaves(candidates)[0].shape[0]
    available = jax.tree.leaves(examples)[0].shape[0]
    if plan[0].candidates != count or plan[-1].examples > available:
        raise ValueError(
            f"the plan is for {plan[0].candidates} candidates and {plan[-1].examples} examples, "
            f"found {count} and {available}"
        )
    loss = jnp.zeros(count)
    seen = jnp.zeros(count, jnp.int32)
    alive = jnp.arange(count)
    before = 0
    for rung in plan:
        if rung.candidates < len(alive):
            alive = alive[jnp.argsort(loss[alive])][: rung.candidates]
        new = jax.tree.map(lambda leaf, a=before, b=rung.examples: leaf[a:b], examples)
        mine = jax.tree.map(lambda leaf, chosen=alive: leaf[chosen], candidates)
        means = jax.lax.map(
            lambda one, new=new: jnp.mean(evaluate(one, new)), mine, batch_size=chunk or len(alive)
        )
        total = loss[alive] * before + means * (rung.examples - before)
        total = jnp.where(jnp.isfinite(total), total, jnp.inf)
        loss = loss.at[alive].set(total / rung.examples)
        seen = seen.at[alive].set(rung.examples)
        before = rung.examples
    order = jnp.lexsort((loss, -seen))
    place = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(count, dtype=jnp.int32))
    return Halving(place, loss, seen)
