"""The hyperparameters and draws of each tensor, as leaf functions take them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxmerge.methods import draws, hyperparameters
from jaxmerge.methods.counting import LARGEST
from jaxmerge.methods.hyperparameters import Fraction
from jaxmerge.methods.leaf import LeafMethod
from jaxmerge.recipes.plan import Plan, PlannedTensor
from jaxmerge.recipes.streaming.grouping import Group
from jaxmerge.tree import name_words

Given = Mapping[str, Any]


class Numbers:
    """What a plan's tensors are merged with; equal numbers are worked out once."""

    def __init__(self, plan: Plan) -> None:
        self._totals = Counter[int]()
        for tensor in merged_once(plan):
            self._totals[tensor.merge] += int(np.prod(tensor.shape, dtype=np.int64))
        self._known: dict[Any, Given] = {}
        self._seed = plan.seed

    def total(self, merge: int) -> int:
        """The number of elements that a merge's tensors have together."""
        return self._totals[merge]

    def values(self, group: Group) -> tuple[Given, bool]:
        """A group's values, and whether they have a leading axis over its rows because they differ."""
        given = [self._values(group, tensor) for tensor in group.tensors]
        if group.rows is None or all(one is given[0] for one in given):
            return given[0], False
        given += [given[0]] * (group.rows - len(given))
        return jax.tree.map(lambda *each: np.stack(each), *given), True

    def seed(self, group: Group) -> np.ndarray | None:
        """The seeds of a group's draws, uint32 [pairs, 2], or [rows, pairs, 2]; None where nothing is drawn."""
        if not group.leaf.random:
            return None
        models = len(group.models[0])
        words = [name_words(tensor.identity) for tensor in group.tensors]
        words += [words[0]] * ((group.rows or 1) - len(words))
        seeds = np.asarray(draws.seeds(models, self._key_words, np.array(words, np.uint32)))
        return seeds if group.rows is not None else seeds[0]

    @functools.cached_property
    def _key_words(self) -> np.ndarray:
        return np.asarray(draws.key_words(jax.random.key(self._seed)))

    def _values(self, group: Group, tensor: PlannedTensor) -> Given:
        leaf, models = group.leaf, len(group.models[0])
        chosen = tuple(sorted(tensor.hyperparameters.items()))
        place = (tensor.merge, chosen, tensor.shape, models)
        if place not in self._known:
            self._known[place] = self._worked_out(leaf, tensor, models)
        return self._known[place]

    def _worked_out(self, leaf: LeafMethod, tensor: PlannedTensor, models: int) -> Given:
        shape = tensor.shape
        checked = hyperparameters.check(leaf.hyperparams, tensor.hyperparameters, models, leaf.name)
        sizes = {
            **leaf.sizes(shape, tuple(range(1, len(shape))), models),
            "tensor": int(np.prod(shape, dtype=np.int64)),
            "model": min(self._totals[tensor.merge], LARGEST),
        }
        values = hyperparameters.for_tensors(leaf.hyperparams, checked, [], sizes, models)[0]
        if self._totals[tensor.merge] > LARGEST:
            for name, spec in leaf.hyperparams.items():
                if spec.kind == "fraction" and spec.share_of == "model":
                    values[name] = self._of_large_model(values[name], checked[name], tensor.merge)
        return values

    def _of_large_model(self, fraction: Fraction, value: np.ndarray, merge: int) -> Fraction:
        """A share of more elements than 32 bits count; selections in passes count in 64."""
        counts = np.floor(value * float(self._totals[merge])).astype(np.uint64)
        whole: Any = np.broadcast_to(counts, np.shape(fraction.count))
        return replace(fraction, count=whole)


def merged_once(plan: Plan) -> list[PlannedTensor]:
    """The tensors that are merged, each tied one once."""
    return [one for one in plan.tensors if one.action == "merge" and one.tied_to is None]
