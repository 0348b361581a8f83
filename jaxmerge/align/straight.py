"""Straight-through estimator matching: descent on the loss of the merged model, through the projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmerge.align.assignment import Solver
from jaxmerge.align.matching import match
from jaxmerge.align.permuting import Permutations, identity, permute
from jaxmerge.align.spaces import weight_space
from jaxmerge.align.spec import PermutationSpec
from jaxmerge.tree import flatten


class StraightInfo(NamedTuple):
    """How a straight-through matching went.

    Attributes:
      losses: float [steps], the loss of the mean of `a` and the permuted `b` at each step.
      best: float [], the least of them, that of the permutations returned.
    """

    losses: jax.Array
    best: jax.Array


def match_ste(
    spec: PermutationSpec,
    a: Any,
    b: Any,
    loss_fn: Callable[[Any, Any], jax.Array],
    batches: Any,
    *,
    optimizer: optax.GradientTransformation | None = None,
    sweeps: int = 3,
    solver: Solver = "auto",
) -> tuple[Permutations, StraightInfo]:
    r"""Finds the permutation of `b`'s units for which the mean of the two models has the least loss.

    .. math:: \min_{\tilde\theta} L\Big(\tfrac12 \big(\theta_a + \pi(\tilde\theta)\, \theta_b\big)\Big), \qquad
              \pi(\tilde\theta) = \arg\max_\pi \langle \tilde\theta, \pi \theta_b \rangle

    Free weights, which begin as `a`'s, are trained; forward, they are projected to the nearest permutation of `b` (all
    trees of nodes, heads with what is in them, by weight matching from where the last step ended), backward
    the projection counts as the identity. One program, a scan over the steps.

    Args:
      spec: where the units stand.
      a, b: trees of floating parameters.
      loss_fn: the loss of parameters and one batch.
      batches: a pytree whose leaves have a leading axis [steps].
      optimizer: by default ``optax.adam(1e-3)``.
      sweeps: of the matching in each step, static.
      solver: see `jaxmerge.align.assign`.

    Returns:
      The permutations of the least loss seen, and a `StraightInfo`.

    Raises:
      ValueError: parameters that do not fit the spec.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> mlp = lambda p, x: jnp.tanh(x @ p["fc1"]) @ p["fc2"]
      >>> a = {"fc1": jax.random.normal(jax.random.key(0), (3, 8)), "fc2": jnp.ones((8, 2))}
      >>> x = jax.random.normal(jax.random.key(1), (2, 16, 3))
      >>> spec = jm.align.symmetry(mlp, a, x[0])
      >>> b = jm.align.permute(spec, {"fc1": jnp.roll(jnp.arange(8), 3)}, a)
      >>> loss = lambda p, x: jnp.mean((mlp(p, x) - mlp(a, x)) ** 2)
      >>> found, info = jm.align.match_ste(spec, a, b, loss, x)
      >>> bool(info.best < 1e-10)
      True

    Reference:
      Ainsworth et al., Git Re-Basin, ICLR 2023, section 3.3. Bengio et al., Estimating or Propagating Gradients Through
      Stochastic Neurons, 2013.
    """
    descent = optax.adam(1e-3) if optimizer is None else optimizer
    spec = spec.sized({path: jnp.shape(leaf) for path, leaf in flatten(a)[0].items()})

    def projected(free: Any, last: Permutations) -> Permutations:
        return match(
            spec,
            free,
            b,
            weight_space("product"),
            start=last,
            sweeps=sweeps,
            solver=solver,
        )[0]

    def step(carry: tuple[Any, ...], batch: Any) -> tuple[tuple[Any, ...], jax.Array]:
        free, state, last, best, least = carry
        found = projected(free, last)
        nearest = permute(spec, found, b)

        def loss(free: Any) -> jax.Array:
            through = jax.tree.map(lambda p, w: w + jax.lax.stop_gradient(p - w), nearest, free)
            return loss_fn(jax.tree.map(lambda p, q: (p + q) / 2, a, through), batch)

        value, gradient = jax.value_and_grad(loss)(free)
        updates, state = descent.update(gradient, state, free)
        better = value < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), found, best)
        carry = optax.apply_updates(free, updates), state, found, best, jnp.minimum(value, least)
        return carry, value

    @jax.jit
    def run(batches: Any) -> tuple[tuple[Any, ...], jax.Array]:
        still = identity(spec)
        start = (a, descent.init(a), still, still, jnp.asarray(jnp.inf))
        return jax.lax.scan(step, start, batches)

    (_, _, _, best, least), losses = run(batches)
    return best, StraightInfo(losses, least)
