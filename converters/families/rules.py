"""Key tables: which tensor of a checkpoint is which leaf of a Flax tree, and how their axes relate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.tree import Layout, TensorLayout


@dataclass(frozen=True)
class Transform:
    """How a leaf becomes its checkpoint's tensor: a transposition, then a reshape; always invertible.

    Attributes:
      axes: the leaf's axes in the checkpoint's order; None for the leaf's own order.
      shape: the checkpoint's shape after the transposition; None for the transposed shape.
      outputs: the checkpoint tensor's output axes.
    """

    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    outputs: tuple[int, ...] = (0,)


def as_is() -> Transform:
    """Vectors, scalars, embedding tables: the same array in both."""
    return Transform()


def linear() -> Transform:
    """A dense kernel [in, out] is the weight [out, in] of PyTorch's `Linear`."""
    return Transform(axes=(1, 0))


def convolution(dimensions: int = 2) -> Transform:
    """A kernel [*window, in, out] is the weight [out, in, *window] of PyTorch's `Conv`; depthwise ones too."""
    return Transform(axes=(dimensions + 1, dimensions, *range(dimensions)))


@dataclass(frozen=True)
class Rule:
    """One line of a key table; it reads in both directions.

    Both patterns hold the same placeholders; each, such as `{i}`, stands for a number.

    Attributes:
      checkpoint: pattern of the names in the checkpoint, "layers.{i}.weight".
      path: pattern of the paths in the tree, "params/layers_{i}/kernel".
      transform: how the leaf becomes the tensor.

    Example:
      >>> rule = Rule("layers.{i}.weight", "params/layers_{i}/kernel", linear())
      >>> rule.name_of("params/layers_3/kernel"), rule.path_of("layers.3.weight")
      ('layers.3.weight', 'params/layers_3/kernel')
      >>> rule.name_of("params/layers_3/bias") is None
      True
    """

    checkpoint: str
    path: str
    transform: Transform = Transform()

    def __post_init__(self) -> None:
        if set(_placeholders(self.checkpoint)) != set(_placeholders(self.path)):
            raise ValueError(f"rule {self.checkpoint!r} <-> {self.path!r}: the placeholders differ")

    def name_of(self, path: str) -> str | None:
        """The checkpoint's name of a leaf, None where the rule does not speak of it."""
        return _translate(path, self.path, self.checkpoint)

    def path_of(self, name: str) -> str | None:
        """The leaf's path of a checkpoint's tensor, None where the rule does not speak of it."""
        return _translate(name, self.checkpoint, self.path)


def matches(name: str, pattern: str) -> bool:
    """Tells whether a whole name matches a pattern with number placeholders.

    Example:
      >>> matches("h.11.attn.bias", "h.{i}.attn.bias"), matches("h.11.attn.bias", "attn.bias")
      (True, False)
    """
    return _expression(pattern).fullmatch(name) is not None


def derive_layout(
    rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]], *, family: str, prefix: str = ""
) -> Layout:
    """Applies a table to all leaves of a tree.

    Args:
      rules: the table.
      shapes: the leaves' shapes by path.
      family: for the messages.
      prefix: what stands before every name in the checkpoint.

    Returns:
      The layout of every leaf, in the order of the table.

    Raises:
      CheckpointError: a leaf that no rule or two rules speak of, a tensor that two leaves would be, a rule that speaks
        of no leaf, a transform that does not fit a leaf's shape. These are errors of the table.
    """
    found: dict[str, list[tuple[int, str]]] = {path: [] for path in shapes}
    for i, rule in enumerate(rules):
        named = [(path, name) for path in shapes if (name := rule.name_of(path)) is not None]
        if not named:
            raise CheckpointError(f"family {family}: rule {rule.path!r} matches no leaf")
        for path, name in named:
            found[path].append((i, name))
    for what, paths in {
        "no rule matches": [path for path, hits in found.items() if not hits],
        "several rules match": [path for path, hits in found.items() if len(hits) > 1],
    }.items():
        if paths:
            raise CheckpointError(f"family {family}: {what} the leaves {listed(paths)}")
    tensors: dict[str, TensorLayout] = {}
    owners: dict[str, str] = {}
    for path, ((i, name),) in sorted(found.items(), key=lambda item: item[1][0][0]):
        if name in owners:
            raise CheckpointError(
                f"family {family}: the leaves {owners[name]!r} and {path!r} are both {name!r}"
            )
        owners[name] = path
        transform = rules[i].transform
        layout = TensorLayout(
            (prefix + name,), transform.axes, transform.shape, outputs=transform.outputs
        )
        try:
            layout.check(path, shapes[path])
        except ValueError as error:
            raise CheckpointError(f"family {family}: {error}") from None
        tensors[path] = layout
    return Layout(tensors)


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names for a message, the first ones where they are many.

    Example:
      >>> listed(["a", "b"]), listed(["a", "b", "c"], most=2)
      ("'a', 'b'", "'a', 'b' and 1 more")
    """
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _placeholders(pattern: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", pattern)


def _translate(text: str, source: str, target: str) -> str | None:
    found = _expression(source).fullmatch(text)
    return None if found is None else target.format(**found.groupdict())


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    parts, seen = re.split(r"\{(\w+)\}", pattern), set[str]()
    text = ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            text += re.escape(part)
        elif part in seen:
            text += f"(?P={part})"
        else:
            seen.add(part)
            text += rf"(?P<{part}>0|[1-9]\d*)"
    return re.compile(text)
