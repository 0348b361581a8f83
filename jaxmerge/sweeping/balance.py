"""A score without data: how evenly a merge leans towards its sources."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.methods.leaf import widen

Tensors = Mapping[str, np.ndarray]


class Group(NamedTuple):
    """Tensors of one shape and dtype, in their storage dtypes.

    Attributes:
        sources: per model, [tensors, ...].
        base: [tensors, ...], or None where models are compared as they are.
    """

    sources: tuple[np.ndarray, ...]
    base: np.ndarray | None


class Balance(NamedTuple):
    """What `cosines` compares with.

    Attributes:
        names: the tensors of each group (static).
        groups: their values.
    """

    names: tuple[tuple[str, ...], ...]
    groups: tuple[Group, ...]


def prepare(models: Sequence[Tensors], base: Tensors | None, names: Sequence[str]) -> Balance:
    """Stacks equal shapes, so that the program does not grow with depth.

    Args:
        models: the sources.
        base: what task vectors start from, or None.
        names: the tensors that are merged.
    """
    trees = [*models, *([] if base is None else [base])]
    alike: dict[Any, list[str]] = defaultdict(list)
    for name in names:
        alike[tuple((tree[name].shape, str(tree[name].dtype)) for tree in trees)].append(name)
    groups = tuple(
        Group(
            tuple(_stack(model, some) for model in models),
            None if base is None else _stack(base, some),
        )
        for some in alike.values()
    )
    return Balance(tuple(map(tuple, alike.values())), groups)


def cosines(merged: Mapping[str, jax.Array], balance: Balance) -> jax.Array:
    r"""The cosine between the merge and each source, over all tensors together.

    .. math:: c_i = \frac{\langle \theta - \theta_0, \theta_i - \theta_0 \rangle}
       {\|\theta - \theta_0\| \|\theta_i - \theta_0\|}

    with theta_0 = 0 where there is no base; 0 where a norm is 0.

    Args:
        merged: the candidate.
        balance: of `prepare`.

    Returns:
        [models].
    """
    products: Any = 0.0
    squares: Any = 0.0
    own: Any = 0.0
    for names, group in zip(balance.names, balance.groups, strict=True):
        base = 0.0 if group.base is None else widen(jnp.asarray(group.base))
        one = widen(jnp.stack([merged[name] for name in names])) - base
        sources = [widen(jnp.asarray(source)) - base for source in group.sources]
        products += jnp.stack([jnp.sum(one * source) for source in sources])
        squares += jnp.stack([jnp.sum(source * source) for source in sources])
        own += jnp.sum(one * one)
    norms = jnp.sqrt(own) * jnp.sqrt(squares)
    return jnp.where(norms > 0, products / jnp.where(norms > 0, norms, 1.0), 0.0)


def _stack(tensors: Tensors, names: Sequence[str]) -> np.ndarray:
    return np.stack([tensors[name] for name in names])
