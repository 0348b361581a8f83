r"""Item-response anchors: a few items of a test stand for all of it.

.. math:: P(y_{mi} = 1) = \frac{1}{1 + e^{-a_i (\theta_m - b_i)}}

with the ability theta of model m, the discrimination a and the difficulty b of item i. Fitted once to the scores of
past models; then a new candidate answers the anchors alone, its ability follows, and with it what the other items would
give.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike


class Items(NamedTuple):
    """The logistic model of n items, float32.

    Attributes:
      discrimination: a > 0, [n]; 1 everywhere in a model of one parameter.
      difficulty: b, [n]: the ability that answers in half of the cases.
    """

    discrimination: jax.Array
    difficulty: jax.Array

    def probability(self, ability: ArrayLike) -> jax.Array:
        """Of a right answer: abilities [...] -> [..., n]."""
        theta = jnp.asarray(ability, jnp.float32)[..., None]
        shape = (*[1] * (theta.ndim - 1), -1)
        a, b = self.discrimination.reshape(shape), self.difficulty.reshape(shape)
        return jax.nn.sigmoid(a * (theta - b))


class Estimate(NamedTuple):
    """What the anchors say, each of the shape of the leading axes of the answers.

    Attributes:
      score: the estimated mean over all items.
      error: its standard error, from the uncertainty of the ability and of the answers not asked for.
      ability: theta.
    """

    score: jax.Array
    error: jax.Array
    ability: jax.Array


def fit_items(
    scores: ArrayLike, parameters: Literal[1, 2] = 2, *, steps: int = 600
) -> tuple[Items, jax.Array]:
    """Fits the model to past scores by maximum a posteriori.

    Priors: standard normal for abilities, normal of standard deviation 2 for difficulties, log-normal of deviation 0.5
    for discriminations. Pure; may be compiled.

    Args:
      scores: float32 [models, n] in [0, 1] (1: right; a fraction is taken as a probability); NaN where unknown.
      parameters: 2 fits both, 1 the difficulties alone. Two need some dozens of models.
      steps: of Adam.

    Returns:
      The items, and the models' abilities, [models].

    Raises:
      ValueError: another shape, or (where the values are at hand) scores outside [0, 1].

    Reference:
      Lord, Applications of item response theory to practical testing problems, 1980.
    """
    table = jnp.asarray(scores, jnp.float32)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"expected scores [models, items], found {list(table.shape)}")
    if not isinstance(table, jax.core.Tracer):
        values = np.asarray(table)
        bad = ~np.isnan(values) & ~((values >= 0) & (values <= 1))
        if bad.any():
            at = np.argwhere(bad)[0].tolist()
            raise ValueError(f"scores lie in [0, 1], found {values[tuple(at)]} at {at}")
    known = ~jnp.isnan(table)
    y = jnp.where(known, table, 0.5)

    def loss(point: dict[str, jax.Array]) -> jax.Array:
        a = jnp.exp(point["log_discrimination"])
        logits = a[None] * (point["ability"][:, None] - point["difficulty"][None])
        fit = jnp.sum(jnp.where(known, optax.sigmoid_binary_cross_entropy(logits, y), 0))
        prior = (
            jnp.sum(point["ability"] ** 2)
            + jnp.sum(point["difficulty"] ** 2) / 4
            + jnp.sum(point["log_discrimination"] ** 2) / 0.25
        )
        return fit + prior / 2

    models, n = table.shape
    start = {
        "ability": jnp.zeros(models),
        "difficulty": jnp.zeros(n),
        "log_discrimination": jnp.zeros(n),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def step(
        carry: tuple[dict[str, jax.Array], optax.OptState], _: None
    ) -> tuple[tuple[dict[str, jax.Array], optax.OptState], None]:
        point, state = carry
        gradient = jax.grad(loss)(point)
        if parameters == 1:
            gradient["log_discrimination"] = jnp.zeros(n)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(point, updates), state), None

    (point, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
    items = Items(jnp.exp(point["log_discrimination"]), point["difficulty"])
    return items, point["ability"]


def choose_anchors(items: Items, count: int, abilities: ArrayLike | None = None) -> jax.Array:
    r"""Chooses the items that tell most about the score, one after the other.

    Each is the one that leaves the least variance of the estimated score, averaged over abilities:

    .. math:: \sum_\theta \frac{S'(\theta)^2}{1 + \sum_{i \in A} a_i^2 p_i (1 - p_i)}

    with S the mean probability over all items; the sum in the denominator is the Fisher information of the anchors A.

    Args:
      items: n items.
      count: how many, static, at most n.
      abilities: [m], of models as they are to be expected; None: a standard normal distribution.

    Returns:
      int32 [count], different items.

    Raises:
      ValueError: a count that is not in [1, n].

    Reference:
      Polo et al., tinyBenchmarks: evaluating LLMs with fewer examples, ICML 2024 (anchors by another rule).
    """
    n = items.difficulty.shape[0]
    if not 1 <= count <= n:
        raise ValueError(f"there are {n} items, {count} anchors cannot be chosen")
    if abilities is None:
        theta = jnp.linspace(-3, 3, 25)
        mass = jnp.exp(-(theta**2) / 2)
    else:
        theta = jnp.asarray(abilities, jnp.float32)
        mass = jnp.ones_like(theta)
    p = items.probability(theta)
    spread = p * (1 - p)
    slope = jnp.mean(items.discrimination[None] * spread, axis=1)
    weight = mass * slope**2
    information = items.discrimination[None] ** 2 * spread

    def choose(
        carry: tuple[jax.Array, jax.Array], _: None
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        known, free = carry
        left = jnp.sum(weight[:, None] / (1 + known[:, None] + information), axis=0)
        best = jnp.argmin(jnp.where(free, left, jnp.inf)).astype(jnp.int32)
        return (known + information[:, best], free.at[best].set(False)), best

    start = (jnp.zeros(theta.shape[0]), jnp.ones(n, bool))
    return jax.lax.scan(choose, start, None, length=count)[1]


def estimate_score(items: Items, anchors: ArrayLike, answers: ArrayLike) -> Estimate:
    """Estimates the score on all items from the answers to a few.

    The answers count as they are, the other items by their probability under the ability of largest posterior (prior:
    standard normal).

    Args:
      items: n items.
      anchors: int32 [c], different items.
      answers: float32 [..., c] in [0, 1], of any number of candidates.

    Returns:
      Score, standard error and ability, [...].

    Example:
      >>> items = Items(jnp.ones(4), jnp.array([-1.0, 0.0, 0.0, 1.0]))
      >>> found = estimate_score(items, jnp.array([1, 2]), jnp.array([[1.0, 0.0], [1.0, 1.0]]))
      >>> print(found.score.round(2))
      [0.5  0.82]
    """
    chosen = jnp.asarray(anchors)
    y = jnp.asarray(answers, jnp.float32)
    a, b = items.discrimination[chosen], items.difficulty[chosen]
    asked = Items(a, b)
    a = a.reshape(*[1] * (y.ndim - 1), -1)

    def newton(theta: jax.Array, _: None) -> tuple[jax.Array, None]:
        p = asked.probability(theta)
        slope = jnp.sum(a * (y - p), axis=-1) - theta
        curvature = 1 + jnp.sum(a**2 * p * (1 - p), axis=-1)
        # The likelihood is flat far out, where whole steps would overshoot.
        return theta + jnp.clip(slope / curvature, -1, 1), None

    theta, _ = jax.lax.scan(newton, jnp.zeros(y.shape[:-1]), None, length=30)
    n = items.difficulty.shape[0]
    p = items.probability(theta)
    known = jnp.zeros(n, bool).at[chosen].set(True).reshape(*[1] * (y.ndim - 1), -1)
    unknown = jnp.where(known, 0, p)
    score = (jnp.sum(y, axis=-1) + jnp.sum(unknown, axis=-1)) / n
    of_anchors = asked.probability(theta)
    information = 1 + jnp.sum(a**2 * of_anchors * (1 - of_anchors), axis=-1)
    discrimination = items.discrimination.reshape(known.shape)
    slope = jnp.sum(discrimination * unknown * (1 - p), axis=-1) / n
    chance = jnp.sum(unknown * (1 - p), axis=-1) / n**2
    return Estimate(score, jnp.sqrt(slope**2 / information + chance), theta)
