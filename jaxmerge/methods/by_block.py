"""`by_block`: another method for each block of a model."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.methods.extras import Extra, gather
from jaxmerge.methods.inputs import flatten_all, is_mergeable
from jaxmerge.methods.leaf import Base
from jaxmerge.methods.method import MergeMethod
from jaxmerge.tree import Layout, TensorLayout, unflatten
from jaxmerge.tree.blocks import Label, Rules, block_names, label_rules, labels_of


def by_block(methods: Mapping[Label, MergeMethod], labels: Any) -> MergeMethod:
    """Merges each block of a model by its own method.

    Hyperparameters nest under the labels: ``{"attn": {"density": 0.3}, "mlp": {...}}``. A layer of a stacked leaf may
    belong to another block than its neighbours. "Model" scope means the block.

    Args:
      methods: a method for each label.
      labels: as for `jaxmerge.tree.per_block`: a tree of labels, or patterns to labels, first match first.

    Returns:
      A `MergeMethod`; equal arguments give the same object.

    Raises:
      ValueError: a label without a method, or a method without a label.

    Example:
      >>> import jax.numpy as jnp, jaxmerge as jm
      >>> method = jm.methods.by_block(
      ...     {"head": jm.methods.slerp(), "body": jm.methods.linear()}, {"head/*": "head", "**": "body"})
      >>> a = {"head": {"w": jnp.ones(2)}, "fc": {"w": jnp.ones(2)}}
      >>> b = {"head": {"w": -jnp.ones(2)}, "fc": {"w": jnp.zeros(2)}}
      >>> merged = jm.merge(method, [a, b], head={"t": 0.25}, body={"weight": [3.0, 1.0]})
      >>> merged["head"]["w"], merged["fc"]["w"]
      (Array([0.5, 0.5], dtype=float32), Array([0.75, 0.75], dtype=float32))
    """
    rules = label_rules(labels)
    blocks = block_names(rules)
    for one, others, what in ((blocks, methods, "method"), (tuple(methods), blocks, "label")):
        lacking = [label for label in one if label not in others]
        if lacking:
            raise ValueError(f"by_block has no {what} for block {lacking[0]!r}")
    return _build(tuple((label, methods[label]) for label in blocks), rules)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockState:
    """One state per block, and how leaves are put together again (static)."""

    states: dict[Label, Any]
    shares: tuple[tuple[str, tuple[tuple[Label, tuple[int, ...] | None], ...]], ...] = field(
        metadata={"static": True}
    )
    definition: Any = field(metadata={"static": True})


@functools.cache
def _build(items: tuple[tuple[Label, MergeMethod], ...], rules: Rules) -> MergeMethod:
    methods = dict(items)
    adapting = [label for label, method in methods.items() if method.per_task]
    if adapting:
        raise ValueError(
            f"by_block cannot use {methods[adapting[0]].name!r}, whose per-task results speak of a whole model"
        )
    needed = {name: extra for method in methods.values() for name, extra in method.extras.items()}

    def init(
        models: Any, base: Any = None, *, layout: Any = None, extras: Any = None, dtype: Any = None
    ) -> BlockState:
        layout = Layout() if layout is None else layout
        models = list(models)
        flat, flat_base, definition = flatten_all(models, base)
        reference = flat[0] if flat_base is None else flat_base
        shares = tuple((path, _shares(rules, path, layout.of(path))) for path in reference)
        depths = layout.depths(reference)
        shapes = {
            path: tuple(np.shape(leaf)) for path, leaf in reference.items() if is_mergeable(leaf)
        }
        gathered = gather(needed, extras, len(models), shapes, "by_block")
        states = {}
        for label, method in methods.items():
            mine = {path: part for path, parts in shares for owner, part in parts if owner == label}
            trees = [_take(leaves, mine) for leaves in flat]
            block_base = None if flat_base is None else _take(flat_base, mine)
            block_layout = _restrict(layout, depths, mine)
            block_extras = {
                name: _restrict_extra(method.extras[name], trees_of, mine)
                for name, trees_of in gathered.items()
                if name in method.extras
            }
            states[label] = method.init(
                trees, block_base, layout=block_layout, extras=block_extras, dtype=dtype
            )
        return BlockState(states, shares, definition)

    def apply(
        state: BlockState,
        hyperparams: Mapping[Any, Any] = MappingProxyType({}),
        key: jax.Array | None = None,
    ) -> Any:
        unknown = [label for label in hyperparams if label not in methods]
        if unknown:
            raise ValueError(
                f"by_block has no block {unknown[0]!r}; its blocks are {list(methods)}"
            )
        merged = {
            label: method.apply(state.states[label], hyperparams.get(label, {}), key)
            for label, method in methods.items()
        }
        leaves = []
        for path, parts in state.shares:
            if len(parts) == 1:
                leaves.append(merged[parts[0][0]][path])
                continue
            whole = jnp.concatenate([merged[label][path] for label, _ in parts])
            came = np.concatenate([np.asarray(layers) for _, layers in parts])
            leaves.append(whole[np.argsort(came)])
        return unflatten(state.definition, leaves)

    lows = [method.models[0] for method in methods.values()]
    highs = [method.models[1] for method in methods.values() if method.models[1] is not None]
    return MergeMethod(
        init,
        apply,
        MappingProxyType({label: method.hyperparams for label, method in methods.items()}),
        name="by_block",
        summary="Another method for each block.",
        base=_strictest([method.base for method in methods.values()]),
        models=(max(lows), min(highs) if highs else None),
        random=any(method.random for method in methods.values()),
        extras=MappingProxyType(needed),
    )


def _strictest(bases: list[Base]) -> Base:
    order: tuple[Base, ...] = ("required", "source", "optional", "unused")
    return next(kind for kind in order if kind in bases)


def _shares(
    rules: Rules, path: str, layout: TensorLayout
) -> tuple[tuple[Label, tuple[int, ...] | None], ...]:
    found = labels_of(rules, path, layout)
    distinct = list(dict.fromkeys(found))
    if len(distinct) == 1:
        return ((distinct[0], None),)
    return tuple(
        (label, tuple(i for i, one in enumerate(found) if one == label)) for label in distinct
    )


def _take(leaves: Mapping[str, Any], mine: Mapping[str, tuple[int, ...] | None]) -> dict[str, Any]:
    return {
        path: leaves[path] if layers is None else leaves[path][np.asarray(layers)]
        for path, layers in mine.items()
    }


def _restrict_extra(
    extra: Extra, trees: tuple[dict[str, Any], ...], mine: Mapping[str, tuple[int, ...] | None]
) -> Any:
    def taken(leaf: Any, layers: tuple[int, ...] | None) -> Any:
        return leaf if layers is None else jax.tree.map(lambda x: x[np.asarray(layers)], leaf)

    parts = [
        {path: taken(tree[path], layers) for path, layers in mine.items() if path in tree}
        for tree in trees
    ]
    return parts[0] if extra.per == "shared" else parts


def _restrict(
    layout: Layout,
    depths: Mapping[str, tuple[float, ...]],
    mine: Mapping[str, tuple[int, ...] | None],
) -> Layout:
    tensors = {}
    for path, layers in mine.items():
        one = layout.of(path)
        kept = range(len(one.names)) if layers is None else layers
        names = tuple(one.names[i] for i in kept)
        tensors[path] = replace(one, names=names, depths=tuple(depths[path][i] for i in kept))
    return Layout(tensors)
