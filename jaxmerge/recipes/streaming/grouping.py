"""Which tensors are worked on together: small ones that are alike as one array, in windows of neighbours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxmerge.converters.dtypes import storage_dtype
from jaxmerge.methods.leaf import LeafMethod, Local
from jaxmerge.recipes.plan import Plan, PlannedInput, PlannedTensor
from jaxmerge.recipes.streaming.cuts import Cut, cuts_of, longest

SMALL = 1 << 16
"""The most elements of a tensor that is put into one array with others."""

_TOGETHER = 1 << 18
_RARE = 8
# So many shapes of tensors that are not grouped are each worth programs of their own.
_FEW = 16
_WINDOW = 1 << 25


@dataclass(frozen=True)
class Group:
    """Tensors of one shape, method and dtypes.

    Attributes:
      leaf: the method.
      tensors: one, or several that are small.
      models: by tensor, what the method takes as models.
      bases: by tensor, what it takes as the base.
      rows: the length of the leading axis over tensors, of which the first are in use; None without the axis. It
        depends on the shape only, so that a tensor's numbers do not depend on what it is grouped with.
      cuts: of one tensor; a single one where there are rows.
    """

    leaf: LeafMethod
    tensors: tuple[PlannedTensor, ...]
    models: tuple[tuple[PlannedInput, ...], ...]
    bases: tuple[PlannedInput | None, ...]
    rows: int | None
    cuts: tuple[Cut, ...]

    @property
    def size(self) -> int:
        """The number of elements of one tensor."""
        return math.prod(self.tensors[0].shape)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The axes of a cut that are its tensor's inputs."""
        cuts = self.leaf.cuts
        return () if cuts == "elements" else tuple(range(1, len(self.tensors[0].shape)))

    @property
    def nbytes(self) -> int:
        """The bytes of all sources."""
        return sum(
            math.prod(one.shape) * storage_dtype(one.dtype).itemsize
            for models, base in zip(self.models, self.bases, strict=True)
            for one in {*models, *(() if base is None else (base,))}
        )

    @property
    def is_measured(self) -> bool:
        """Whether a tensor is looked at before it is merged."""
        return any(
            one.scope == "tensor" and not isinstance(one, Local) for one in self.leaf.measures
        )


@dataclass(frozen=True)
class Window:
    """Neighbours in the output, in order, and the groups that they are merged in."""

    tensors: tuple[PlannedTensor, ...]
    groups: tuple[Group, ...]


class Grouping:
    """Groups a plan's tensors; what is grouped how depends on the plan alone."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        mine = [tensor for tensor in plan.tensors if self._is_streamed(tensor)]
        self._often = Counter(map(self._kind, mine))
        rare = {tensor.shape for tensor in mine if not self._is_grouped(tensor)}
        shapes = {shape for shape in rare if math.prod(shape) <= longest(1)}
        self._whole = shapes if len(shapes) <= _FEW else set()

    def windows(self, tensors: Iterable[PlannedTensor]) -> Iterator[Window]:
        """Cuts a sequence of tensors into windows."""
        mine: list[PlannedTensor] = []
        held = 0
        for tensor in tensors:
            size = tensor.nbytes * max(1, len(tensor.inputs))
            if mine and held + size > _WINDOW:
                yield self._window(mine)
                mine, held = [], 0
            mine.append(tensor)
            held += size
        if mine:
            yield self._window(mine)

    def _window(self, tensors: Sequence[PlannedTensor]) -> Window:
        small: dict[Any, list[PlannedTensor]] = {}
        groups: list[Group] = []
        for tensor in tensors:
            if not self._is_streamed(tensor):
                continue
            if self._is_grouped(tensor):
                small.setdefault(self._kind(tensor), []).append(tensor)
            else:
                groups.append(self._group([tensor], None))
        for mine in small.values():
            rows = _rows(math.prod(mine[0].shape))
            groups += [
                self._group(mine[start : start + rows], rows) for start in range(0, len(mine), rows)
            ]
        return Window(tuple(tensors), tuple(groups))

    def _group(self, tensors: Sequence[PlannedTensor], rows: int | None) -> Group:
        leaf = self._leaf(tensors[0])
        sources = [_sources(leaf, tensor) for tensor in tensors]
        shape = tensors[0].shape
        size, arrays = math.prod(shape), len(tensors[0].inputs)
        if rows is not None:
            cuts = [Cut(0, size, (size,) if leaf.cuts == "elements" else shape)]
        elif shape in self._whole and size <= longest(arrays):
            cuts = [Cut(0, size, shape)]
        else:
            cuts = cuts_of(leaf.cuts, shape, arrays)
        return Group(
            leaf,
            tuple(tensors),
            tuple(models for models, _ in sources),
            tuple(base for _, base in sources),
            rows,
            tuple(cuts),
        )

    def _is_streamed(self, tensor: PlannedTensor) -> bool:
        return tensor.action == "merge" and self._plan.merges[tensor.merge].method.leaf is not None

    def _is_grouped(self, tensor: PlannedTensor) -> bool:
        return (
            self._leaf(tensor).cuts != "never"
            and math.prod(tensor.shape) <= SMALL
            and self._often[self._kind(tensor)] >= _RARE
        )

    def _kind(self, tensor: PlannedTensor) -> Any:
        leaf = self._leaf(tensor)
        models, base = _sources(leaf, tensor)
        return (
            tensor.merge,
            math.prod(tensor.shape) if leaf.cuts == "elements" else tensor.shape,
            tuple(one.dtype for one in models),
            None if base is None else base.dtype,
            tensor.dtype,
        )

    def _leaf(self, tensor: PlannedTensor) -> LeafMethod:
        leaf = self._plan.merges[tensor.merge].method.leaf
        assert leaf is not None
        return leaf


def _sources(
    leaf: LeafMethod, tensor: PlannedTensor
) -> tuple[tuple[PlannedInput, ...], PlannedInput | None]:
    if leaf.base == "source" and tensor.base is not None:
        return (tensor.base, *tensor.models), None
    return tensor.models, None if leaf.base == "unused" else tensor.base


def _rows(size: int) -> int:
    return max(4, min(256, 1 << (max(1, _TOGETHER // size).bit_length() - 1)))
