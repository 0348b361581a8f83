"""One group of tensors, cut by cut: what is measured of it, and what it becomes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxmerge.converters import Checkpoint
from jaxmerge.converters.byte_io import aligned
from jaxmerge.converters.dtypes import storage_dtype
from jaxmerge.methods.leaf import Chunk, LeafMethod, Local, Measure, Select, Sums
from jaxmerge.methods.measuring import (
    finished,
    found_by,
    local_values,
    ranked_values,
    statistics_of,
)
from jaxmerge.methods.selection import Selection, select_in_passes, select_rows_on_host
from jaxmerge.methods.selection.stream import At, Look, Only
from jaxmerge.recipes.inputs import read
from jaxmerge.recipes.plan import Plan, PlannedInput
from jaxmerge.recipes.streaming.cuts import Cut
from jaxmerge.recipes.streaming.grouping import SMALL, Group
from jaxmerge.recipes.streaming.numbers import Given, Numbers
from jaxmerge.recipes.streaming.piece import Piece
from jaxmerge.recipes.streaming.pipeline import each

Found = dict[str, Any]


@dataclass(frozen=True)
class Shop:
    """What work needs.

    Attributes:
      plan: the plan.
      checkpoints: its sources, open.
      numbers: the tensors' hyperparameters and seeds.
      pool: computes cuts.
      ahead: how many cuts may be computed before they are wanted.
    """

    plan: Plan
    checkpoints: Sequence[Checkpoint]
    numbers: Numbers
    pool: Executor
    ahead: int


class Work:
    """One group, being merged.

    Args:
      shop: what is needed.
      group: the group.
      keep: whether to keep in memory what was read until it is merged.
    """

    def __init__(self, shop: Shop, group: Group, *, keep: bool) -> None:
        self.group = group
        self.found: Found = {}
        self._shop = shop
        self._values, self._per_tensor = shop.numbers.values(group)
        self._seed = shop.numbers.seed(group)
        self._keep = keep or group.rows is not None
        self._kept: dict[Cut, tuple[list[np.ndarray], np.ndarray | None]] = {}

    def measure(self, of_model: Mapping[str, Any], before: Measure | None = None) -> None:
        """Takes the measures in order.

        Args:
          of_model: by name, what the measures over the whole model gave: summed statistics, or selections by tensor.
          before: stop at this one.
        """
        for one in self.group.leaf.measures:
            if one is before:
                return
            if isinstance(one, Local):
                continue
            if one.scope == "model":
                known = of_model[one.name]
                self.found[one.name] = (
                    self.finish(one, self._spread(known))
                    if isinstance(one, Sums)
                    else self._selections(known)
                )
            elif isinstance(one, Sums):
                self.found[one.name] = self.finish(one, self._total(one))
            else:
                self.found[one.name] = self._select(one)

    def merged(self) -> Iterator[Piece]:
        """Gives the merged tensors cut by cut, and lets go of what was kept."""
        group = self.group
        dtype = storage_dtype(group.tensors[0].dtype)

        def apply(cut: Cut, chunk: Chunk, found: Found) -> tuple[Cut, np.ndarray]:
            merged = _apply(
                group.leaf,
                jax.dtypes.canonicalize_dtype(dtype),
                self._stacked,
                self._per_tensor,
                chunk,
                self._values,
                found,
            )
            return cut, np.asarray(merged).astype(dtype, copy=False)

        for cut, values in self._over(apply, forget=True):
            if self._stacked:
                for tensor, row in zip(group.tensors, values, strict=False):
                    yield Piece(tensor.name, 0, row.reshape(-1), True)
            else:
                last = cut.stop == group.size
                yield Piece(group.tensors[0].name, cut.start, values.reshape(-1), last)

    def statistics(self, one: Sums) -> Iterator[Any]:
        """The statistics of each cut in turn, with a leading axis over tensors where they are several."""
        return self._over(
            lambda cut, chunk, found: jax.tree.map(
                np.asarray,
                statistics_of(one, self._stacked, self._per_tensor, chunk, self._values, found),
            ),
            before=one,
        )

    def finish(self, one: Sums, total: Any) -> Any:
        """What the statistics of the whole come to."""
        with self._wide():
            result = finished(one, self._stacked, self._per_tensor, total, self._values, self.found)
            return jax.tree.map(np.asarray, result)

    def ranked(
        self, one: Select, look: Look, only: Only | None = None, at: At | None = None
    ) -> Iterator[Any]:
        """Makes a pass over the values that a measure ranks, tensor by tensor: see `selection.stream.Passes`."""
        group = self.group
        name = group.tensors[0].identity

        def over(cut: Cut, chunk: Chunk, found: Found) -> list[Any]:
            if not self._stacked:
                if at is None:
                    return [look(name, cut.start, self._ranked(one, chunk, found))]
                places = at(name, cut.start, cut.stop - cut.start)
                return [look(name, cut.start, self._ranked_at(places, one, chunk, found))]
            rows = [
                (row, tensor.identity)
                for row, tensor in enumerate(group.tensors)
                if only is None or only(tensor.identity, 0)
            ]
            ranked = self._ranked(one, chunk, found)
            flat = [values.reshape(len(values), -1) for values in ranked]
            return [
                look(
                    name,
                    0,
                    [v[row] if at is None else v[row][at(name, 0, v[row].size)] for v in flat],
                )
                for row, name in rows
            ]

        cuts = group.cuts
        if only is not None and not self._stacked:
            cuts = tuple(cut for cut in cuts if only(name, cut.start))
        for results in self._over(over, before=one, cuts=cuts):
            yield from results

    def counts(self, one: Select, size: int) -> list[tuple[Any, ...]]:
        """How many values each selection keeps; with a leading axis over tensors where their numbers differ."""
        more = (self.found,) if one.reads_found else ()
        if self._stacked and (self._per_tensor or one.reads_found):
            axes = (0 if self._per_tensor else None, *(0 for _ in more))
            counts = jax.vmap(lambda values, *found: one.counts(values, size, *found), axes)(
                self._values, *more
            )
        else:
            counts = one.counts(self._values, size, *more)
        return jax.tree.map(np.asarray, counts)

    @property
    def _stacked(self) -> bool:
        return self.group.rows is not None

    def unasked(self, one: Sums) -> Any:
        """The statistics where they do not depend on the tensors, else None."""
        return None if one.unasked is None else one.unasked(self._values)

    def _total(self, one: Sums) -> Any:
        known = self.unasked(one)
        if known is not None:
            return known if self._per_tensor or not self._stacked else self._spread(known)
        total = Total(one.reduce)
        for sums in self.statistics(one):
            total.add(sums)
        return total.result()

    def _select(self, one: Select) -> list[tuple[Selection, ...]]:
        group = self.group
        counts = self.counts(one, group.size)
        whole = group.rows is not None or group.leaf.cuts == "never" or group.size <= SMALL
        if len(group.cuts) > 1 or not whole:
            name = group.tensors[0].identity

            def passes(look: Look, only: Only | None = None, at: At | None = None) -> Iterator[Any]:
                return self.ranked(one, look, only, at)

            return select_in_passes(passes, counts, {name: group.size})[name]
        (ranked,) = self._over(
            lambda cut, chunk, found: self._ranked(one, chunk, found), before=one
        )
        rows = group.rows or 1
        return [
            tuple(self._select_rows(values, np.broadcast_to(k, rows)) for k in ks)
            for values, ks in zip(ranked, counts, strict=True)
        ]

    def _select_rows(self, values: np.ndarray, counts: np.ndarray) -> Selection:
        found = select_rows_on_host(values.reshape(len(counts), -1), counts)
        place: Any = ... if self._stacked else 0
        return Selection(found.thresholds[place], found.cuts[place])

    def _ranked(self, one: Select, chunk: Chunk, found: Found) -> list[np.ndarray]:
        values = ranked_values(one, self._stacked, chunk, found_by(one, found))
        return [np.asarray(array) for array in values]

    def _ranked_at(
        self, places: np.ndarray, one: Select, chunk: Chunk, found: Found
    ) -> list[np.ndarray]:
        """The ranked values at some places of a chunk, computed from these alone where elements stand by themselves."""
        leaf = self.group.leaf
        if leaf.cuts != "elements" or any(isinstance(other, Local) for other in leaf.measures):
            return [values.reshape(-1)[places] for values in self._ranked(one, chunk, found)]
        # Few lengths, so that few programs are compiled.
        length = 1 << max(0, places.size - 1).bit_length()
        padded = np.resize(places, length) if places.size else np.zeros(length, np.int64)
        some = jax.tree.map(lambda x: x.reshape(-1)[padded], (chunk.models, chunk.base))
        picked = dataclasses.replace(chunk, models=some[0], base=some[1])
        return [values[: places.size] for values in self._ranked(one, picked, found)]

    def _selections(self, known: Mapping[str, Any]) -> list[tuple[Selection, ...]]:
        """The selections of the whole model that concern this group."""
        mine = [known[tensor.identity] for tensor in self.group.tensors]
        if self.group.rows is None:
            return mine[0]
        mine += [mine[0]] * (self.group.rows - len(mine))
        return jax.tree.map(lambda *each: np.stack(each), *mine)

    def _spread(self, total: Any) -> Any:
        rows = self.group.rows
        if rows is None:
            return total
        return jax.tree.map(lambda x: np.broadcast_to(x, (rows, *np.shape(x))), total)

    def _over(
        self,
        function: Callable[[Cut, Chunk, Found], Any],
        *,
        before: Measure | None = None,
        cuts: Sequence[Cut] | None = None,
        forget: bool = False,
    ) -> Iterator[Any]:
        """Gives what a function makes of each cut, in order; the function gets what is found before a measure."""

        def look(cut: Cut) -> Any:
            with self._wide():
                chunk = self._chunk(cut)
                if forget:
                    self._kept.pop(cut, None)
                return function(cut, chunk, self._seen(chunk, before))

        cuts = self.group.cuts if cuts is None else cuts
        if len(cuts) == 1:
            return iter([look(cuts[0])])
        return each(self._shop.pool, look, cuts, self._shop.ahead)

    def _seen(self, chunk: Chunk, before: Measure | None) -> Found:
        """What is found, and what the chunk says of itself."""
        seen = dict(self.found)
        for one in self.group.leaf.measures:
            if one is before:
                break
            if isinstance(one, Local):
                seen[one.name] = local_values(one, self._stacked, chunk, found_by(one, seen))
        return seen

    def _chunk(self, cut: Cut) -> Chunk:
        models, base = self._arrays(cut)
        many = () if self.group.rows is None else (self.group.rows,)
        depths = [tensor.depth for tensor in self.group.tensors]
        depths += depths[:1] * ((self.group.rows or 1) - len(depths))
        return Chunk(
            tuple(models),  # type: ignore[arg-type]
            base,  # type: ignore[arg-type]
            self._seed,  # type: ignore[arg-type]
            np.full(many, cut.start, np.uint32),  # type: ignore[arg-type]
            np.array(depths if many else depths[0], np.float32),  # type: ignore[arg-type]
            dict.fromkeys(self.group.leaf.extras, ()),
            np.full(many, self.group.size, np.uint32),  # type: ignore[arg-type]
            self.group.inputs,
        )

    def _arrays(self, cut: Cut) -> tuple[list[np.ndarray], np.ndarray | None]:
        if cut in self._kept:
            return self._kept[cut]
        group, shop = self.group, self._shop

        @functools.cache
        def given(one: PlannedInput) -> np.ndarray:
            return read(shop.checkpoints, shop.plan, one, cut.start, cut.stop)

        def joined(inputs: Sequence[PlannedInput]) -> np.ndarray:
            if group.rows is None:
                return given(inputs[0]).reshape(cut.shape)
            first = given(inputs[0])
            array = aligned(group.rows * first.size, first.dtype).reshape(group.rows, -1)
            array[:] = first
            for row, one in enumerate(inputs[1:], 1):
                array[row] = given(one)
            return array.reshape(group.rows, *cut.shape)

        models = [joined(inputs) for inputs in zip(*group.models, strict=True)]
        bases = [base for base in group.bases if base is not None]
        arrays = models, joined(bases) if bases else None
        if self._keep:
            self._kept[cut] = arrays
        return arrays

    def _wide(self) -> contextlib.AbstractContextManager[Any]:
        """Float64 tensors are merged in float64."""
        inputs = [*self.group.models[0], self.group.bases[0]]
        wide = any(one is not None and one.dtype == "float64" for one in inputs)
        return jax.enable_x64(True) if wide else contextlib.nullcontext()


class Total:
    """Statistics of chunks, added up in double precision."""

    def __init__(self, reduce: str) -> None:
        self._add = np.add if reduce == "sum" else np.maximum
        self._total: Any = None
        self._dtypes: Any = None

    def add(self, sums: Any) -> None:
        """Adds the statistics of one more chunk."""
        if self._total is None:
            self._dtypes = jax.tree.map(lambda x: x.dtype, sums)
            self._total = jax.tree.map(_widest, sums)
        else:
            self._total = jax.tree.map(
                lambda whole, part: self._add(whole, _widest(part)), self._total, sums
            )

    def result(self) -> Any:
        """The statistics of all chunks, in their own dtypes."""
        return jax.tree.map(lambda x, dtype: x.astype(dtype), self._total, self._dtypes)


def _widest(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _apply(
    leaf: LeafMethod,
    dtype: Any,
    stacked: bool,
    per_tensor: bool,
    chunk: Chunk,
    values: Given,
    found: Found,
) -> jax.Array:
    def run(chunk: Chunk, values: Given, found: Found) -> jax.Array:
        return leaf.apply(chunk, values, found).astype(dtype)

    if not stacked:
        return run(chunk, values, found)
    return jax.vmap(run, in_axes=(0, 0 if per_tensor else None, 0))(chunk, values, found)
