"""Labels that say which block each leaf belongs to, and values per block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.tree.layout import TensorLayout
from jaxmerge.tree.paths import Pattern, flatten, matches, nearest

Label = str | int
Rules = tuple[tuple[Pattern, Label | tuple[Label, ...]], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerBlock:
    """Hyperparameter values per block; made by `per_block`.

    Attributes:
      values: [blocks] or [blocks, models].
      rules: static pairs (pattern or path, label, or one label per stacked layer); the first match decides.
      blocks: the labels in the order of `values`' axis 0 (static).
    """

    values: Any
    rules: Rules = field(metadata={"static": True})
    blocks: tuple[Label, ...] = field(metadata={"static": True})

    def rows(self, path: str, layout: TensorLayout) -> list[int]:
        """The row of `values` for a leaf, or one row per layer of a stacked leaf."""
        return [self.blocks.index(label) for label in labels_of(self.rules, path, layout)]


def per_block(values: Any, labels: Any) -> PerBlock:
    """Gives a hyperparameter one value per block.

    Args:
      values: [blocks] or [blocks, models] array or nested list, float; or a mapping from label to a number or to one
        number per model. Rows follow the labels in order of first appearance (integers: ascending).
      labels: a static tree like the parameters whose leaves are labels (str or int, or a tuple of them, one per layer,
        for a leaf whose layers are stacked), or a mapping from patterns to labels, first match first (see
        `jaxmerge.tree.matches`; a pattern may match a leaf's path or, with a layout, its checkpoint name).

    Returns:
      A pytree to pass in place of the hyperparameter's value; `values` is traced, the labels are static.

    Raises:
      ValueError: the number of rows is not the number of blocks, or a mapping's keys are not the labels.

    Example:
      >>> density = per_block([0.2, 0.9], {"attn/**": "attention", "**": "rest"})
      >>> density.blocks
      ('attention', 'rest')
    """
    rules = label_rules(labels)
    blocks = block_names(rules)
    if isinstance(values, Mapping):
        unknown = [key for key in values if key not in blocks]
        if unknown:
            raise ValueError(
                f"unknown block {unknown[0]!r}{nearest(str(unknown[0]), map(str, blocks))}; "
                f"the labels are {list(blocks)}"
            )
        missing = [block for block in blocks if block not in values]
        if missing:
            raise ValueError(f"no value for block {missing[0]!r}")
        rows = [values[block] for block in blocks]
        traced = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(rows))
        values = (
            jnp.stack([jnp.asarray(row) for row in rows])
            if traced
            else np.asarray(rows, np.float64)
        )
    elif not isinstance(values, jax.Array):
        values = np.asarray(values, np.float64)
    if values.ndim not in (1, 2) or values.shape[0] != len(blocks):
        raise ValueError(
            f"per_block needs values of shape [{len(blocks)}] or [{len(blocks)}, models] for blocks "
            f"{list(blocks)}, found shape {tuple(values.shape)}"
        )
    return PerBlock(values, rules, blocks)


def label_rules(labels: Any) -> Rules:
    """Brings labels, a mapping of patterns or a tree, into one hashable form."""
    if isinstance(labels, Mapping) and all(_is_label(value) for value in labels.values()):
        return tuple((pattern, _static_label(value)) for pattern, value in labels.items())
    leaves, _ = flatten(jax.tree.map(_Leaf, labels, is_leaf=_is_label))
    return tuple((_escape(path), leaf.label) for path, leaf in leaves.items())


def block_names(rules: Rules) -> tuple[Label, ...]:
    """The distinct labels: integers in ascending order, names in order of first appearance."""
    seen: dict[Label, None] = {}
    for _, label in rules:
        for one in label if isinstance(label, tuple) else (label,):
            seen[one] = None
    return tuple(sorted(seen, key=int)) if all(isinstance(b, int) for b in seen) else tuple(seen)


def labels_of(rules: Rules, path: str, layout: TensorLayout) -> list[Label]:
    """The label of a leaf; one label per layer where the leaf is stacked.

    Raises:
      ValueError: no rule matches the leaf, or a tuple of labels does not fit its layers.
    """
    found = []
    for layer, name in enumerate(layout.names):
        for pattern, label in rules:
            if not (matches(path, pattern) or matches(name, pattern)):
                continue
            if isinstance(label, tuple):
                if len(label) != len(layout.names):
                    raise ValueError(
                        f"{path!r} has {len(layout.names)} layer(s), but {len(label)} labels were given"
                    )
                label = label[layer]
            found.append(label)
            break
        else:
            raise ValueError(f"no label for {path!r}; add a pattern such as '**' that matches it")
    return found


class _Leaf:
    """Holds a label so that a tree of labels flattens at the labels."""

    def __init__(self, label: Any) -> None:
        self.label = _static_label(label)


def _is_label(value: Any) -> bool:
    if isinstance(value, str | int | np.integer):
        return True
    return (
        isinstance(value, Sequence)
        and len(value) > 0
        and all(isinstance(one, str | int | np.integer) for one in value)
        and isinstance(value, tuple)
    )


def _static_label(value: Any) -> Label | tuple[Label, ...]:
    if isinstance(value, tuple):
        return tuple(one if isinstance(one, str) else int(one) for one in value)
    return value if isinstance(value, str) else int(value)


def _escape(path: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)
