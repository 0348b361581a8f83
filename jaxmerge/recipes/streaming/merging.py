"""The streamed merge: pieces of planned tensors in bounded memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from jaxmerge.converters import Checkpoint, open_checkpoint
from jaxmerge.converters.dtypes import storage_dtype
from jaxmerge.recipes.inputs import read
from jaxmerge.recipes.plan import Plan, PlannedTensor
from jaxmerge.recipes.streaming import memory
from jaxmerge.recipes.streaming.cuts import Cut, cuts_of
from jaxmerge.recipes.streaming.grouping import Group, Grouping, Window
from jaxmerge.recipes.streaming.in_memory import merge_in_memory
from jaxmerge.recipes.streaming.numbers import Numbers, merged_once
from jaxmerge.recipes.streaming.piece import Piece
from jaxmerge.recipes.streaming.pipeline import in_order
from jaxmerge.recipes.streaming.whole_model import measure_whole_model
from jaxmerge.recipes.streaming.work import Shop, Work

Result = TypeVar("Result")

_LANES = 2


def merged(
    plan: Plan, tensors: Iterable[PlannedTensor], *, memory_limit: int | None = None
) -> Iterator[Piece]:
    """Merges some tensors of a plan, piece by piece.

    Every tensor is merged by the leaf functions that merge it in memory. Reading, computing and what the caller does
    with a piece overlap. What a tensor becomes depends neither on the memory limit nor on which others are asked for.

    Args:
      plan: the plan.
      tensors: those of its tensors that are wanted, in an order that the sources can be read in.
      memory_limit: the bytes that the process may hold; default: three quarters of what is free.

    Yields:
      The tensors' pieces, tensor by tensor in the order given, from the first element to the last.

    Raises:
      CheckpointError: a source holds NaN or infinity, or cannot be read.
      ValueError: the plan's models are to be aligned, and are not yet.
    """
    if plan.alignment is not None and plan.aligned is None:
        raise ValueError("the plan's models are not aligned yet: see jaxmerge.recipes.aligning")
    limit = memory.default_limit() if memory_limit is None else memory_limit
    shares = memory.shares(limit, plan.tensors, plan.merges)
    grouping, numbers = Grouping(plan), Numbers(plan)
    leaves = [one.method.leaf for one in plan.merges]
    # What cannot be cut is worked on alone: one tensor is all the memory, and its factorisations all the threads.
    alone = any(leaf is None or leaf.cuts == "never" for leaf in leaves)
    with contextlib.ExitStack() as stack:
        checkpoints = [
            stack.enter_context(open_checkpoint(source.path, key=source.key))
            for source in plan.sources
        ]
        pool = stack.enter_context(ThreadPoolExecutor(shares.threads))
        shop = Shop(plan, checkpoints, numbers, pool, ahead=2 * shares.threads)
        at_once = _AtOnce(plan, checkpoints)

        def begin(group: Group) -> Work:
            return Work(shop, group, keep=_is_kept(group, shares.kept))

        def in_windows(
            chosen: Iterable[PlannedTensor], produce: Callable[[Window], Iterator[Result]]
        ) -> Iterator[Result]:
            return in_order(
                grouping.windows(chosen),
                produce,
                held=lambda window: _held(window, shares.kept),
                room=shares.kept,
                lanes=1 if alone else min(_LANES, shares.threads),
            )

        def over_groups(
            chosen: Sequence[PlannedTensor], produce: Callable[[Group], Iterator[Result]]
        ) -> Iterator[Result]:
            return in_windows(
                chosen,
                lambda window: (result for group in window.groups for result in produce(group)),
            )

        of_model = measure_whole_model(plan, over_groups, begin, numbers)

        def pieces(window: Window) -> Iterator[Piece]:
            small: dict[str, Piece] = {}
            large: dict[str, Group] = {}
            for group in window.groups:
                if group.rows is None:
                    large[group.tensors[0].name] = group
                    continue
                work = begin(group)
                work.measure(of_model.get(group.tensors[0].merge, {}))
                small.update((piece.name, piece) for piece in work.merged())
            for tensor in window.tensors:
                if tensor.action == "carry":
                    yield from _carried(shop, tensor)
                elif plan.merges[tensor.merge].method.leaf is None:
                    yield Piece(tensor.name, 0, at_once.merged(tensor).reshape(-1), True)
                elif tensor.name in small:
                    yield small.pop(tensor.name)
                else:
                    work = begin(large[tensor.name])
                    work.measure(of_model.get(tensor.merge, {}))
                    yield from work.merged()

        yield from in_windows(tensors, pieces)


class _AtOnce:
    """The results of methods that merge all tensors at once, made when the first is wanted."""

    def __init__(self, plan: Plan, checkpoints: Sequence[Checkpoint]) -> None:
        self._plan = plan
        self._checkpoints = checkpoints
        self._made: dict[int, dict[str, np.ndarray]] = {}

    def merged(self, tensor: PlannedTensor) -> np.ndarray:
        if tensor.merge not in self._made:
            mine = [one for one in merged_once(self._plan) if one.merge == tensor.merge]
            self._made[tensor.merge] = merge_in_memory(self._plan, mine, self._checkpoints)
        return self._made[tensor.merge][tensor.identity]


def _carried(shop: Shop, tensor: PlannedTensor) -> Iterator[Piece]:
    size, dtype = math.prod(tensor.shape), storage_dtype(tensor.dtype)
    # A tensor without elements is one empty piece.
    for cut in cuts_of("elements", tensor.shape) or [Cut(0, 0, (0,))]:
        values = read(shop.checkpoints, shop.plan, tensor.models[0], cut.start, cut.stop)
        yield Piece(tensor.name, cut.start, values.astype(dtype, copy=False), cut.stop == size)


def _is_kept(group: Group, kept: int) -> bool:
    return group.is_measured and group.nbytes <= kept


def _held(window: Window, kept: int) -> int:
    """The bytes of sources that a window keeps at once."""
    together = sum(group.nbytes for group in window.groups if group.rows is not None)
    alone = [
        group.nbytes for group in window.groups if group.rows is None and _is_kept(group, kept)
    ]
    return together + max(alone, default=0)
