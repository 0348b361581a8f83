"""What methods measure over all tensors of a model before they merge the first one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge.methods.leaf import Select, Sums
from jaxmerge.methods.selection import select_in_passes
from jaxmerge.methods.selection.stream import At, Look, Only
from jaxmerge.recipes.plan import Plan, PlannedTensor
from jaxmerge.recipes.streaming.grouping import Group
from jaxmerge.recipes.streaming.numbers import Numbers, merged_once
from jaxmerge.recipes.streaming.work import Total, Work

OfModel = Mapping[int, Mapping[str, Any]]
"""By merge and by measure: summed statistics, or selections by tensor."""

OverGroups = Callable[[Sequence[PlannedTensor], Callable[[Group], Iterator[Any]]], Iterator[Any]]
"""Gives what a function yields for each group of some tensors, in order."""


def measure_whole_model(
    plan: Plan, over: OverGroups, begin: Callable[[Group], Work], numbers: Numbers
) -> OfModel:
    """Takes all measures over whole models, merge by merge, each in passes over the merge's tensors.

    Args:
      plan: the plan; all of its tensors are measured.
      over: makes a pass.
      begin: takes up the work on a group.
      numbers: the tensors' hyperparameters.
    """
    tensors: dict[int, list[PlannedTensor]] = defaultdict(list)
    for tensor in merged_once(plan):
        tensors[tensor.merge].append(tensor)
    found: dict[int, dict[str, Any]] = {}
    for merge, mine in tensors.items():
        leaf = plan.merges[merge].method.leaf
        known = found.setdefault(merge, {})
        for one in () if leaf is None else leaf.measures:
            if one.scope != "model":
                continue
            if isinstance(one, Sums):
                known[one.name] = _sums(one, mine, known, over, begin)
            elif isinstance(one, Select):
                total = numbers.total(merge)
                known[one.name] = _selections(one, mine, known, over, begin, total)
    return found


def _sums(
    one: Sums,
    tensors: Sequence[PlannedTensor],
    known: Mapping[str, Any],
    over: OverGroups,
    begin: Callable[[Group], Work],
) -> Any:
    def statistics(group: Group) -> Iterator[Any]:
        work = begin(group)
        work.measure(known, before=one)
        for sums in work.statistics(one):
            yield sums if group.rows is None else _of_rows(one, len(group.tensors), sums)

    if all(tensor.hyperparameters == tensors[0].hyperparameters for tensor in tensors):
        first = next(over(tensors[:1], lambda group: iter([begin(group)])))
        unasked = first.unasked(one)
        if unasked is not None:
            return unasked
    total = Total(one.reduce)
    for sums in over(tensors, statistics):
        total.add(sums)
    return total.result()


def _of_rows(one: Sums, rows: int, sums: Any) -> Any:
    """The statistics of the first rows together."""
    within = np.add if one.reduce == "sum" else np.maximum
    return jax.tree.map(lambda x: within.reduce(x[:rows], axis=0, dtype=x.dtype), sums)


def _selections(
    one: Select,
    tensors: Sequence[PlannedTensor],
    known: Mapping[str, Any],
    over: OverGroups,
    begin: Callable[[Group], Work],
    total: int,
) -> Any:
    def passes(look: Look, only: Only | None = None, at: At | None = None) -> Iterator[Any]:
        def ranked(group: Group) -> Iterator[Any]:
            work = begin(group)
            work.measure(known, before=one)
            return work.ranked(one, look, only, at)

        return over(tensors, ranked)

    first = next(over(tensors[:1], lambda group: iter([begin(group)])))
    # The share is that of the model, and so the same for every tensor.
    counts = first.counts(one, total)
    if first.group.rows is not None:
        counts = jax.tree.map(lambda k: k[0] if np.ndim(k) else k, counts)
    sizes = {tensor.identity: int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors}
    return select_in_passes(passes, counts, dict(sorted(sizes.items())))
