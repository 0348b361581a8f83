"""The points of a grid over a recipe: what each merge gets, and the recipe of each."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmerge import methods
from jaxmerge.recipes import Recipe, Resolved, resolve
from jaxmerge.recipes.dialect import MERGEKIT, mergekit_name
from jaxmerge.recipes.errors import did_you_mean
from jaxmerge.sweeping.axis import Axis

_MOST = 1_000_000


@dataclass(frozen=True)
class Grid:
    """All combinations of the axes' values, the last axis changing fastest.

    Attributes:
        resolved: the recipe at the grid's first point.
        axes: in the order given.
        points: float32 [points, axes].
    """

    resolved: Resolved
    axes: tuple[Axis, ...]
    points: np.ndarray

    @property
    def labels(self) -> tuple[str, ...]:
        """The axes' names."""
        return tuple(axis.label for axis in self.axes)

    @property
    def fixed(self) -> dict[str, float | list[float]]:
        """The hyperparameters that the grid leaves as the recipe has them."""
        swept = {axis.name for axis in self.axes}
        given = self.resolved.hyperparameters
        return {name: value for name, value in given.items() if name not in swept}

    @functools.cached_property
    def swept(self) -> dict[str, np.ndarray]:
        """The others by name: float32 [points], or [points, models] where models differ."""
        columns: dict[str, np.ndarray] = {}
        # What is set for all comes first: what is set for one model overrides it.
        for axis, column in sorted(
            zip(self.axes, self.points.T, strict=True), key=lambda pair: pair[0].model is not None
        ):
            if axis.model is None:
                columns[axis.name] = column
                continue
            values = columns.get(axis.name)
            if values is None:
                values = np.asarray(self.resolved.hyperparameters[axis.name], np.float32)
                values = values if values.ndim else values[None]
            if values.ndim == 1:
                shape = (len(self.points), len(self.resolved.models))
                values = values[:, None] if axis.name in columns else values[None, :]
                values = np.broadcast_to(values, shape).copy()
            values[:, _indices(self.resolved).index(axis.model)] = column
            columns[axis.name] = values
        return columns

    def recipe(self, index: int) -> Recipe:
        """Writes one point into the recipe; merging that gives the point's candidate exactly.

        Args:
            index: which point, a row of `points`.
        """
        recipe = self.resolved.recipe
        shared = dict(recipe.parameters)
        own = [dict(source.parameters) for source in recipe.models]
        for name, values in self.swept.items():
            for level in (shared, *own):
                level.pop(name, None)
                level.pop(mergekit_name(name), None)
            key = _spelled(recipe, name)
            if values.ndim == 1:
                shared[key] = float(values[index])
                continue
            for model, value in zip(_indices(self.resolved), values[index], strict=True):
                # A base that is merged as one more model has no place of its own.
                level = shared if model is None else own[model]
                level[key] = float(value)
        models = tuple(
            source.model_copy(update={"parameters": parameters})
            for source, parameters in zip(recipe.models, own, strict=True)
        )
        return recipe.model_copy(update={"parameters": shared, "models": models})


def make_grid(recipe: Recipe, axes: Sequence[Axis]) -> Grid:
    """Makes the grid of a recipe.

    Args:
        recipe: what it sets and no axis does stays as it is; what an axis sets may be missing.
        axes: at least one.

    Raises:
        RecipeError: the recipe cannot be resolved.
        ValueError: an unknown hyperparameter, a value out of bounds, a model that is not there, an
            axis given twice, more than a million points; a recipe with slices or modules, with
            gradients or filters that no axis replaces, or with models of different tensors.

    >>> from jaxmerge.recipes import parse
    >>> from jaxmerge.sweeping import parse_axis
    >>> recipe = parse("merge_method: linear\\nmodels: [{model: a}, {model: b}]")
    >>> grid = make_grid(recipe, [parse_axis("weight=1"), parse_axis("weight[1]=0.5,2")])
    >>> grid.swept["weight"].tolist()
    [[1.0, 0.5], [1.0, 2.0]]
    """
    if not axes:
        raise ValueError("a sweep needs at least one axis, as in --grid density=0.1:1:8")
    if recipe.merge_method in methods.names():
        for axis in axes:
            _check_axis(recipe, axis)
    labels = [axis.label for axis in axes]
    for axis in axes:
        if [(other.name, other.model) for other in axes].count((axis.name, axis.model)) > 1:
            raise ValueError(f"--grid {axis.text}: {axis.label!r} is given twice")
    resolved = resolve(_completed(recipe, axes))
    for axis in axes:
        _check_model(resolved, axis)
    count = math.prod(len(axis.values) for axis in axes)
    if count > _MOST:
        raise ValueError(
            f"the grid over {', '.join(labels)} has {count} points, the most is {_MOST}"
        )
    mesh = np.meshgrid(*[np.asarray(axis.values, np.float32) for axis in axes], indexing="ij")
    grid = Grid(resolved, tuple(axes), np.stack([part.reshape(-1) for part in mesh], axis=1))
    _check_uniform(grid.recipe(0))
    return grid


def _check_uniform(recipe: Recipe) -> None:
    """One program merges every point, so every tensor is merged alike."""
    if recipe.tensors != "same":
        raise ValueError(f"a sweep needs models of the same tensors: `tensors: {recipe.tensors}`")
    if recipe.slices or recipe.modules:
        raise ValueError(
            "a sweep needs whole models, under `models`; this recipe has slices or modules"
        )
    if not resolve(recipe).uniform:
        raise ValueError(
            "a sweep needs numbers that are the same for every tensor: besides what it varies, the "
            "recipe has gradients or filters"
        )


def _check_axis(recipe: Recipe, axis: Axis) -> None:
    """Name and bounds, which the method alone decides."""
    constructor = methods.get(recipe.merge_method)
    specs: dict[str, Any] = dict(constructor().hyperparams)
    peer = MERGEKIT.get(recipe.merge_method) if recipe.dialect == "mergekit" else None
    if peer is not None:
        specs = {name: specs[name] for name in specs if mergekit_name(name) in peer.parameters}
    where = f"--grid {axis.text}"
    if axis.name not in specs:
        if axis.key in methods.options(constructor):
            raise ValueError(
                f"{where}: {axis.key!r} is an option of {recipe.merge_method}, fixed in a sweep: "
                "set it under `options` in the recipe"
            )
        valid = [_spelled(recipe, name) for name in specs]
        raise ValueError(
            f"{where}: {recipe.merge_method} has no hyperparameter {axis.key!r}"
            f"{did_you_mean(axis.key, valid)}"
        )
    spec = specs[axis.name]
    if axis.model is not None and spec.scope == "shared":
        raise ValueError(f"{where}: {axis.key!r} is shared by all models; leave out the index")
    for value in axis.values:
        if spec.kind == "flag" and value not in (0.0, 1.0):
            raise ValueError(f"{where}: {axis.key!r} is a flag (true or false), found {value:g}")
        if spec.kind == "index" and not value.is_integer():
            raise ValueError(f"{where}: {axis.key!r} is a whole number, found {value:g}")
        if not spec.low <= value <= spec.high:
            raise ValueError(
                f"{where}: {axis.key!r} must lie in [{spec.low:g}, {spec.high:g}], found {value:g}"
            )


def _check_model(resolved: Resolved, axis: Axis) -> None:
    if axis.model is None or axis.model in _indices(resolved):
        return
    listed = len(resolved.recipe.models)
    reason = (
        f"the recipe has {listed} models, the last is {axis.key}[{listed - 1}]"
        if axis.model >= listed
        else "that model is the base, which is not merged as one"
    )
    raise ValueError(f"--grid {axis.text}: {reason}")


def _completed(recipe: Recipe, axes: Sequence[Axis]) -> Recipe:
    """Sets what only the grid gives, so that the recipe can be resolved."""
    shared = dict(recipe.parameters)
    own = [dict(source.parameters) for source in recipe.models]
    for axis in axes:
        spelled = {axis.name, mergekit_name(axis.name)}
        key = _spelled(recipe, axis.name)
        if axis.model is None and not any(spelled & level.keys() for level in (shared, *own)):
            shared[key] = axis.values[0]
        elif (
            axis.model is not None
            and axis.model < len(own)
            and not (spelled & (own[axis.model].keys() | shared.keys()))
        ):
            own[axis.model][key] = axis.values[0]
    models = tuple(
        source.model_copy(update={"parameters": parameters})
        for source, parameters in zip(recipe.models, own, strict=True)
    )
    return recipe.model_copy(update={"parameters": shared, "models": models})


def _indices(resolved: Resolved) -> list[int | None]:
    """The place of each merged model in the recipe's list; None for a base merged as one more."""
    indices: list[int | None] = []
    start = 0
    listed = resolved.recipe.models
    for reference in resolved.models:
        found = next((i for i in range(start, len(listed)) if listed[i].model == reference), None)
        indices.append(found)
        start = len(listed) if found is None else found + 1
    return indices


def _spelled(recipe: Recipe, name: str) -> str:
    """The recipe's word for a hyperparameter."""
    peer = recipe.dialect == "mergekit" and recipe.merge_method in MERGEKIT
    return mergekit_name(name) if peer else name
