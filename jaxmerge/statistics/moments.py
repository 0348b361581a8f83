"""Fisher information for free: what an adaptive optimiser has already accumulated."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.tree import flatten, nearest, unflatten


def fisher_from_moments(
    state: Any,
    params: Any = None,
    *,
    batch_size: int = 1,
    b2: Any = None,
    steps: Any = None,
) -> Any:
    r"""Diagonal empirical Fisher information from an optimiser's second moments.

    .. math:: F \approx B \hat\nu, \quad \hat\nu = \nu / (1 - \beta_2^{\text{steps}})

    An average of squared gradients, each of a loss averaged over B examples, estimates
    :math:`F / B + (1 - 1 / B) (\nabla L)^2`: near convergence, where the whole gradient vanishes, F / B. Far from it,
    and where the gradient carries a penalty (L2 added to the loss, clipping), the estimate is off. Clipping scales
    gradients down and so the whole estimate.

    Args:
      state: an optax state, in which second moments (`nu` of Adam, AdamW, Nadam, AMSGrad, RMSProp) are found however
        deep they lie in chains, masks, partitions and injected hyperparameters; or a tree of moments (PyTorch's
        `exp_avg_sq`). AdaMax and Yogi hold other quantities in the same state as Adam: do not pass theirs.
      params: the model, needed where parts of it are masked from the optimiser. Its leaves without moments get zeros.
      batch_size: B, in the unit that the loss averages over: examples, or tokens (F is then per token). Gradients
        accumulated over several batches count all their examples.
      b2: decay of the second moments, to correct their start from 0. Default: the injected one, else optax's own,
        0.999 for Adam and 0.9 for RMSProp.
      steps: number of updates, in place of the state's own count; where neither is known nothing is corrected.

    Returns:
      A tree like `params` (or like the moments), float32 (float64 where the moments are).

    Raises:
      ValueError: no second moments or several for one tensor, tensors that `params` lacks or has in another shape, no
        update yet, or a number out of range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.zeros(2)}
      >>> optimiser = optax.adam(1e-3)
      >>> _, state = optimiser.update({"w": jnp.array([0.5, 1.0])}, optimiser.init(params))
      >>> fisher_from_moments(state, batch_size=8)["w"].round(3)
      Array([2., 8.], dtype=float32)

    Reference:
      Li et al., Fishers for Free? Approximating the Fisher Information Matrix by Recycling the Squared Gradient
      Accumulator, ICML 2025; Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022.
    """
    for name, value in (("batch_size", batch_size), ("steps", steps)):
        if value is not None and _known(value) and value < 1:
            raise ValueError(f"{name} is at least 1, found {value}")
    if b2 is not None and _known(b2) and not 0 < b2 < 1:
        raise ValueError(f"b2 lies between 0 and 1, found {b2}")
    found = _found(state, params)
    moments: dict[str, jax.Array] = {}
    for one in found:
        factor = batch_size / _correction(one, b2, steps)
        for path, leaf in flatten(one.nu)[0].items():
            if path in moments:
                raise ValueError(
                    f"several second moments for tensor {path!r}: pass the state of one optimiser"
                )
            leaf = jnp.asarray(leaf)
            wide = leaf.astype(jnp.promote_types(jnp.float32, leaf.dtype))
            moments[path] = wide * jnp.asarray(factor, wide.dtype)
    masked = any(_is_mask(leaf) for one in found for leaf in _leaves(one.nu))
    if params is None:
        if masked or len(found) > 1:
            raise ValueError(
                "the optimiser's state covers the model in parts (masked or partitioned): pass params="
            )
        return unflatten(flatten(found[0].nu)[1], moments.values())
    return _filled(moments, params, masked)


class _Moments(NamedTuple):
    nu: Any
    count: Any
    b2: Any


# States with an attribute `nu` that holds something other than a mean of squared gradients.
_OTHERS = {
    "ScaleByBeliefState": "AdaBelief keeps deviations from the mean gradient",
    "ScaleByNovogradState": "NovoGrad keeps one number per tensor",
    "ScaleBySM3State": "SM3 keeps maxima over rows and columns",
}


def _found(state: Any, params: Any) -> list[_Moments]:
    if params is not None and flatten(state)[1] == flatten(params)[1]:
        return [_Moments(state, None, None)]
    found = list(_search(state, None))
    if found:
        return found
    if _has_states(state) or not jax.tree.leaves(state):
        raise ValueError(
            f"found no second moments in {type(state).__name__}: pass the state of an optimiser that keeps them "
            "(Adam, RMSProp), or a tree of them"
        )
    return [_Moments(state, None, None)]


def _search(node: Any, b2: Any) -> Iterator[_Moments]:
    kind = type(node).__name__
    if kind in _OTHERS:
        raise ValueError(f"{kind} holds no second moments: {_OTHERS[kind]}")
    if hasattr(node, "nu"):
        decay = (
            b2
            if b2 is not None
            else 0.9
            if kind.startswith(("ScaleByRms", "ScaleByRStd"))
            else 0.999
        )
        # Every tuple has a method `count`.
        count = node.count if "count" in getattr(node, "_fields", ()) else None
        yield _Moments(node.nu, count, decay)
        return
    injected = getattr(node, "hyperparams", None)
    if isinstance(injected, Mapping):
        b2 = injected.get("b2", injected.get("decay", b2))
    for child in _children(node):
        yield from _search(child, b2)


def _children(node: Any) -> list[Any]:
    if isinstance(node, Mapping):
        return list(node.values())
    if isinstance(node, tuple | list):
        return list(node)
    if dataclasses.is_dataclass(node):
        return [getattr(node, field.name) for field in dataclasses.fields(node)]
    return []


def _has_states(node: Any) -> bool:
    """Whether a named tuple, as optax's states are, lies anywhere inside."""
    return hasattr(node, "_fields") or any(map(_has_states, _children(node)))


def _is_mask(node: Any) -> bool:
    return type(node).__name__ == "MaskedNode"


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_mask)


def _correction(one: _Moments, b2: Any, steps: Any) -> Any:
    """1 - b2^steps: how much of the average's weight lies on gradients rather than on its start, 0."""
    steps = one.count if steps is None else steps
    if steps is None:
        return 1.0
    if np.ndim(steps) > 0:
        raise ValueError(
            f"the count of updates is one number, found {list(np.shape(steps))}: vmap over stacked states"
        )
    if _known(steps) and steps < 1:
        raise ValueError("the optimiser has made no update yet: its second moments are empty")
    decay = b2 if b2 is not None else one.b2 if one.b2 is not None else 0.999
    # In float64 where it can be: 1 - 0.999 has 5 digits in float32.
    logarithm = np.log(np.float64(decay)) if _known(decay) else jnp.log(decay)
    return -jnp.expm1(steps * jnp.float32(logarithm))


def _filled(moments: Mapping[str, jax.Array], params: Any, masked: bool) -> Any:
    leaves, definition = flatten(params)
    for path in moments:
        if path not in leaves:
            raise ValueError(
                f"params lacks {path!r}, a tensor of the optimiser{nearest(path, leaves)}"
            )
    filled = []
    for path, leaf in leaves.items():
        floating = jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.floating)
        if path not in moments:
            if floating and not masked:
                raise ValueError(
                    f"the optimiser has no second moments for {path!r}{nearest(path, moments)}"
                )
            filled.append(jnp.zeros(np.shape(leaf), jnp.float32))
        elif moments[path].shape != np.shape(leaf):
            raise ValueError(
                f"tensor {path!r}: params has shape {list(np.shape(leaf))}, "
                f"its second moments {list(moments[path].shape)}"
            )
        else:
            filled.append(moments[path])
    return unflatten(definition, filled)


def _known(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer)
