"""The one gate that every spec passes: a random member of the group leaves the function as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.align.permuting import permute, random
from jaxmerge.align.spec import PermutationSpec
from jaxmerge.tree import flatten


def verify(
    spec: PermutationSpec,
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: Any,
    key: jax.Array,
    *,
    trials: int = 1,
) -> jax.Array:
    r"""How much random relabellings change a model's outputs.

    .. math:: \max_{\pi} \frac{\max |f(\pi \theta, x) - f(\theta, x)|}{\max |f(\theta, x)|}

    Rounding alone is some 1e-6 in float32 and 1e-14 in float64; an error in a spec is of the order of 1.

    Args:
      spec: the symmetry.
      apply_fn: the model's function of parameters and inputs.
      params: its parameters.
      inputs: one pytree, or a tuple of what `apply_fn` takes after the parameters.
      key: a JAX key.
      trials: how many relabellings.

    Returns:
      float [], the largest relative change; NaN where an output is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, jaxmerge as jm
      >>> mlp = lambda p, x: jnp.tanh(x @ p["fc1"]) @ p["fc2"]
      >>> params = {"fc1": jnp.arange(8.0).reshape(2, 4) / 8, "fc2": jnp.ones((4, 3))}
      >>> x = jnp.ones((5, 2))
      >>> spec = jm.align.symmetry(mlp, params, x)
      >>> bool(jm.align.verify(spec, mlp, params, x, jax.random.key(0)) < 1e-5)
      True
    """
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    spec = spec.sized({path: np.shape(leaf) for path, leaf in flatten(params)[0].items()})
    before = apply_fn(params, *given)

    @jax.jit
    def change(one: jax.Array) -> jax.Array:
        after = apply_fn(permute(spec, random(spec, one), params), *given)
        return jnp.max(
            jnp.stack(
                [_largest(a - b) for a, b in zip(*map(_floats, (after, before)), strict=True)]
            )
        ) / jnp.max(jnp.stack([_largest(b) for b in _floats(before)]))

    return jnp.max(jnp.stack([change(one) for one in jax.random.split(key, trials)]))


def _floats(tree: Any) -> list[jax.Array]:
    return [jnp.asarray(leaf, jnp.result_type(float)) for leaf in jax.tree.leaves(tree)]


def _largest(array: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(array))
