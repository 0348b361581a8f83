"""Which tensors share a coefficient."""

import re
from typing import Any, Literal

from jaxmerge.methods.inputs import is_mergeable
from jaxmerge.tree import Layout, flatten, layer_of

Level = Literal["layer", "tensor"]


def block_labels(
    params: Any, level: Level = "layer", *, layout: Layout | None = None
) -> dict[str, str | tuple[str, ...]]:
    """Labels the tensors of a model by their layer, or by their own name, for `jaxmerge.tree.per_block`.

    A tensor's layer is that of its checkpoint name (`jaxmerge.tree.layer_of`: "layers/3", "Block_0"). One whose name
    holds no number belongs to the part of the model that its name begins with, where names no longer all begin alike
    ("params/head").

    Args:
      params: one of the models.
      level: "layer" or "tensor".
      layout: as for `jaxmerge.merge`; the layers of a stacked leaf are tensors of their own.

    Returns:
      A label by pattern, one label per layer for a stacked leaf; leaves that are not merged have none.

    Raises:
      ValueError: another level.

    Example:
      >>> block_labels({"head": {"w": 1.0}, "layers": [{"w": 1.0}, {"w": 1.0}]})
      {'head/w': 'head', 'layers/0/w': 'layers/0', 'layers/1/w': 'layers/1'}
    """
    if level not in ("layer", "tensor"):
        raise ValueError(f'level is "layer" or "tensor", found {level!r}')
    layout = Layout() if layout is None else layout
    leaves, _ = flatten(params)
    names = {path: layout.of(path).names for path, leaf in leaves.items() if is_mergeable(leaf)}
    shared = _shared_parts([name for several in names.values() for name in several])
    labels: dict[str, str | tuple[str, ...]] = {}
    for path, several in names.items():
        found = tuple(
            name if level == "tensor" else layer_of(name) or _leading(name, shared + 1)
            for name in several
        )
        labels[_pattern(path)] = found if layout.of(path).stacked else found[0]
    return labels


def _shared_parts(names: list[str]) -> int:
    """How many leading parts all names share, the last part of a name not counted."""
    parts = [re.split(r"[/.]", name)[:-1] for name in names]
    shared = 0
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared


def _leading(name: str, parts: int) -> str:
    return "".join(re.split(r"([/.])", name)[: 2 * parts - 1])


def _pattern(path: str) -> str:
    return re.sub(r"[*?\[]", r"[\g<0>]", path)
