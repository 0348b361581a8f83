"""Adapters merged with each other."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.converters.lora.adapter import LoraAdapter, check_only_updates
from jaxmerge.converters.lora.factors import LowRank, check_rank, factorise, low_rank_sum, truncate
from jaxmerge.methods import MergeMethod, get, merge
from jaxmerge.tree import Layout, TensorLayout, depths

_REASON = (
    "cannot be merged with other adapters: apply each adapter to its base and merge the models"
)


def add_loras(
    adapters: Sequence[LoraAdapter],
    weights: Sequence[float] | jax.Array | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> LoraAdapter:
    r"""Adds adapters with weights: exact in the sum of what they add, without cross terms.

    .. math:: \Delta = \sum_i w_i B_i A_i

    Args:
      adapters: of one base; a tensor that some do not change counts as unchanged there.
      weights: one number per adapter; None: 1 each. May be traced where neither rank nor energy is given.
      rank: of the result; None: the sum of the ranks, which loses nothing.
      energy: the least share of the squared norm to keep; see `truncate`.

    Returns:
      An adapter.

    Raises:
      ValueError: no adapters, another number of weights, other shapes, or adapters with tensors trained whole or
        DoRA's magnitudes.

    Example:
      >>> one = LoraAdapter({"w": LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), (2, 2))})
      >>> both = add_loras([one, one], [0.5, 2.0])
      >>> both.updates["w"].rank, float(both.updates["w"].dense()[0, 0])
      (2, 2.5)
    """
    if not adapters:
        raise ValueError("expected at least one adapter")
    weights = jnp.ones(len(adapters)) if weights is None else jnp.asarray(weights, jnp.float32)
    if weights.shape != (len(adapters),):
        raise ValueError(
            f"expected {len(adapters)} weights, one per adapter, found shape {list(weights.shape)}"
        )
    if rank is not None or energy is not None:
        check_rank(rank, energy)
    updates: dict[str, LowRank] = {}
    for name in _names(adapters):
        _template(name, adapters)
        having = [i for i, one in enumerate(adapters) if name in one.updates]
        terms = [adapters[i].updates[name] for i in having]
        total = low_rank_sum(terms, weights[jnp.asarray(having)])
        shortened = rank is not None or energy is not None
        updates[name] = truncate(total, rank=rank, energy=energy) if shortened else total
    return replace(adapters[0], updates=updates)


def merge_loras(
    method: str | MergeMethod,
    adapters: Sequence[LoraAdapter],
    *,
    rank: int | None = None,
    energy: float | None = None,
    key: jax.Array | None = None,
    options: Mapping[str, Any] | None = None,
    **hyperparams: Any,
) -> LoraAdapter:
    """Merges adapters by any operator: as dense task vectors, tensor by tensor where that is enough, then factored.

    Args:
      method: a registered name or a `MergeMethod`, as for `jaxmerge.merge`; the base is a model of zeros.
      adapters: of one base; a tensor that some do not change has a zero task vector there.
      rank: the result's rank.
      energy: the least share of the squared norm to keep; see `factorise`.
      key: a JAX key, for random methods.
      options: the method's static options, where `method` is a name.
      **hyperparams: as for `jaxmerge.merge`.

    Returns:
      An adapter.

    Raises:
      ValueError: as for `jaxmerge.merge` and `add_loras`; or neither a rank nor an energy.

    Example:
      >>> one = LoraAdapter({"w": LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), (2, 2))})
      >>> found = merge_loras("ties", [one, one], rank=1, density=1.0)
      >>> found.updates["w"].dense().round(3)
      Array([[1., 1.],
             [1., 1.]], dtype=float32)
    """
    check_rank(rank, energy)
    if not adapters:
        raise ValueError("expected at least one adapter")
    if isinstance(method, str):
        method = get(method)(**(options or {}))
    elif options:
        raise ValueError("options go with a method's name; this is a constructed method")
    templates = {name: _template(name, adapters) for name in _names(adapters)}
    # A tensor by itself does not tell how deep it lies in its model.
    depth = depths(templates)
    updates: dict[str, LowRank] = {}
    for names in [list(templates)] if _measures_all(method) else [[name] for name in templates]:
        zeros = {name: jnp.zeros(templates[name].shape) for name in names}
        dense = [
            {n: one.updates[n].dense() if n in one.updates else zeros[n] for n in names}
            for one in adapters
        ]
        layout = Layout({n: TensorLayout((n,), depths=(depth[n],)) for n in names})
        merged = method.params_of(
            merge(method, dense, base=zeros, key=key, layout=layout, **hyperparams)
        )
        for name in names:
            updates[name] = factorise(
                merged[name], rank=rank, energy=energy, kind=templates[name].kind
            )
    return replace(adapters[0], updates=updates)


def _measures_all(method: MergeMethod) -> bool:
    """Whether a tensor's merge depends on the other tensors."""
    return method.leaf is None or any(m.scope == "model" for m in method.leaf.measures)


def _names(adapters: Sequence[LoraAdapter]) -> list[str]:
    for adapter in adapters:
        check_only_updates(adapter, _REASON)
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.updates))


def _template(name: str, adapters: Sequence[LoraAdapter]) -> LowRank:
    """The first adapter's update of a tensor; all have its shape."""
    terms = [one.updates[name] for one in adapters if name in one.updates]
    shapes = sorted({term.shape for term in terms})
    if len(shapes) > 1:
        raise ValueError(f"the adapters' {name!r} have the shapes {list(map(list, shapes))}")
    return terms[0]
