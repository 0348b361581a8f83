"""What a SEARCH.yaml means: the method, the space, the objective, and the recipe of each point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import methods
from jaxmerge.learning.block_labels import block_labels
from jaxmerge.methods import MergeMethod
from jaxmerge.methods.hyperparameters import Hyperparameter
from jaxmerge.recipes import Plan, Recipe, Resolved, load_sources, make_plan, resolve
from jaxmerge.recipes.errors import did_you_mean
from jaxmerge.recipes.schema import Block, Source
from jaxmerge.recipes.source_map import SourceMap
from jaxmerge.search import Space, space_of
from jaxmerge.searching.schema import SearchFile
from jaxmerge.searching.scoring import Scoring, make_scoring
from jaxmerge.tree import matches

Labels = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Task:
    """A search that is ready to run.

    Attributes:
        search: as written.
        plan: of a merge of the same models.
        members: the methods to choose from, by their names in the space.
        labels: from block to the patterns of its tensors; None where the model is one.
        space: what varies.
        scoring: how a candidate is scored.
        fixed: hyperparameters that stay, nested as the method takes them.
    """

    search: SearchFile
    plan: Plan
    members: Mapping[str, tuple[str, Mapping[str, Any], MergeMethod]]
    labels: Labels | None
    space: Space
    scoring: Scoring
    fixed: Mapping[str, Any]

    @property
    def objectives(self) -> int:
        """How many numbers are minimised."""
        return len(self.scoring.names) if self.search.pareto else 1

    def objective(self) -> Callable[..., Any]:
        """The function that `evolve` minimises, of a point, a key and `scoring.args`."""
        scores, fixed, pareto = self.scoring.scores, self.fixed, self.search.pareto
        mean = jnp.mean if self.scoring.traced else np.mean

        def objective(point: Any, key: jax.Array, *args: Any) -> Any:
            found = scores(_filled(point, fixed), *args)
            return -found if pareto else -mean(found)

        return objective

    def scores(self, point: Any) -> np.ndarray:
        """The scores of a point, more is better."""
        scores = jax.jit(self.scoring.scores) if self.scoring.traced else self.scoring.scores
        return np.asarray(scores(_filled(point, self.fixed), *self.scoring.args), np.float64)

    def choices(self, point: Any) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
        """For each block (or "model") the method, its options, and its numbers in a recipe's form."""
        complete = _filled(point, self.fixed)
        blocks = {"model": complete} if self.labels is None else complete
        found = {}
        for label in ["model"] if self.labels is None else self.labels:
            values = blocks.get(label, {})
            names = list(self.members)
            name = names[int(values.get("method", 0))] if len(names) > 1 else names[0]
            inner = values.get(name, {}) if len(names) > 1 else values
            method, options, _ = self.members[name]
            found[label] = (method, dict(options), {k: _plain(v) for k, v in inner.items()})
        return found

    def recipe(self, point: Any) -> Recipe:
        """The recipe that merges a point; run with the search's seed it gives its candidate."""
        recipe = self.plan.resolved.recipe
        choices = self.choices(point)
        first = next(iter(choices.values()))
        method, options, parameters = first
        update: dict[str, Any] = {
            "merge_method": method,
            "options": options,
            "parameters": {name: _setting(value) for name, value in parameters.items()},
        }
        if self.labels is not None:
            update["parameters"] = {}
            update["blocks"] = tuple(
                Block.model_validate(
                    {
                        "tensors": self.labels[label],
                        "merge_method": method,
                        "options": options,
                        "parameters": parameters,
                    }
                )
                for label, (method, options, parameters) in choices.items()
            )
        return recipe.model_copy(update=update)


def make_task(search: SearchFile) -> Task:
    """Looks everything up, loads the models, and makes the space and the objective.

    Raises:
        RecipeError: unknown methods, options, hyperparameters or ranges.
        PlanError: models that are not there or do not fit together.
        CheckpointError: a tensor that is not finite or cannot be read.
        EvaluatorError: an objective that cannot be imported or fails.
    """
    members = _members(search)
    resolved = [_resolved(search, method, options) for method, options, _ in members.values()]
    # Where one method has use for the base, all get it.
    probe = next((one for one in resolved if one.base is not None), resolved[0])
    plan = make_plan(probe, seed=search.seed)
    models, base = load_sources(plan)
    names = [t.name for t in plan.tensors if t.action == "merge" and t.tied_to is None]
    models = [{name: model[name] for name in names} for model in models]
    base = None if base is None else {name: base[name] for name in names}
    labels = _labels(search, models[0])
    several = {name: method for name, (_, _, method) in members.items()}
    member = methods.choose(several) if len(several) > 1 else next(iter(several.values()))
    method = member
    if labels is not None:
        rules = {pattern: label for label, patterns in labels.items() for pattern in patterns}
        method = methods.by_block(dict.fromkeys(labels, member), rules)
    count = len(models) + (member.base == "source" and base is not None)
    fixed = _fixed(search, method.hyperparams, count)
    made = _space(search, method, count)
    scoring = make_scoring(
        search, plan, method, models, base, lambda point: _filled(point, fixed), made
    )
    if search.pareto and len(scoring.names) < 2:
        raise search.error("`pareto` needs an objective with several scores", "pareto")
    return Task(search, plan, members, labels, made, scoring, fixed)


def _members(search: SearchFile) -> dict[str, tuple[str, Mapping[str, Any], MergeMethod]]:
    members: dict[str, tuple[str, Mapping[str, Any], MergeMethod]] = {}
    for i, candidate in enumerate(search.methods):
        try:
            method = methods.get(candidate.method)(**candidate.options)
        except (ValueError, TypeError) as error:
            raise search.error(str(error), "methods", i) from None
        if method.leaf is None or method.per_task:
            raise search.error(
                f"{candidate.method} is not a method of tensors with one result", "methods", i
            )
        if method.extras:
            needed = ", ".join(method.extras)
            raise search.error(
                f"{candidate.method} needs {needed}, which no search file can give", "methods", i
            )
        name = candidate.method
        while name in members:
            name += "'"
        members[name] = (candidate.method, candidate.options, method)
    return members


def _resolved(search: SearchFile, method: str, options: Mapping[str, Any]) -> Resolved:
    recipe = Recipe(
        dialect="jaxmerge",
        merge_method=method,
        base_model=search.base_model,
        models=tuple(Source(model=model) for model in search.models),
        options=dict(options),
        dtype=search.dtype,
    )
    recipe._folder = search.folder
    # Errors name the search's file; the recipe's lines are not its own.
    recipe._source = SourceMap(search.filename, {})
    return resolve(recipe)


def _labels(search: SearchFile, tensors: Mapping[str, np.ndarray]) -> Labels | None:
    if search.blocks is None:
        return None
    if isinstance(search.blocks, dict):
        for name in tensors:
            if not any(matches(name, one) for some in search.blocks.values() for one in some):
                raise search.error(
                    f"no block holds the tensor {name!r}; add one with the pattern '**'", "blocks"
                )
        return search.blocks
    labels: dict[str, tuple[str, ...]] = {}
    for pattern, label in block_labels(tensors, search.blocks).items():
        labels[str(label)] = (*labels.get(str(label), ()), pattern)
    return labels


def _space(search: SearchFile, method: MergeMethod, models: int) -> Space:
    known = {name.rpartition("/")[2] for name in _leaves(method.hyperparams)}
    for name in search.space:
        if name not in known:
            raise search.error(
                f"no method has a hyperparameter {name!r}{did_you_mean(name, known)}", "space", name
            )
    wanted = [*search.space, "method"] if search.space else [*known]
    wanted = [name for name in wanted if name in known and name not in search.parameters]
    ranges = {name: (one.low, one.high, one.scale) for name, one in search.space.items()}
    try:
        return space_of(method, models=models, only=wanted, ranges=ranges)
    except ValueError as error:
        raise search.error(str(error), "space") from None


def _fixed(search: SearchFile, specs: Mapping[Any, Any], models: int) -> dict[Any, Any]:
    known = {name.rpartition("/")[2] for name in _leaves(specs)}
    for name, value in search.parameters.items():
        if name not in known:
            raise search.error(
                f"no method has a hyperparameter {name!r}{did_you_mean(name, known)}",
                "parameters",
                name,
            )
        if name in search.space:
            raise search.error(f"{name!r} is in `space` too", "parameters", name)
        if isinstance(value, list) and len(value) != models:
            raise search.error(
                f"{name!r} needs a number, or {models} (one for each model)", "parameters", name
            )

    def level(specs: Mapping[Any, Any]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for name, spec in specs.items():
            if isinstance(spec, Hyperparameter):
                if name in search.parameters:
                    found[name] = np.asarray(search.parameters[name], np.float32)
            elif below := level(spec):
                found[name] = below
        return found

    return level(specs)


def _leaves(specs: Mapping[Any, Any], prefix: str = "") -> list[str]:
    names = []
    for name, spec in specs.items():
        inner = isinstance(spec, Mapping)
        names += _leaves(spec, f"{prefix}{name}/") if inner else [f"{prefix}{name}"]
    return names


def _filled(point: Any, fixed: Mapping[str, Any]) -> dict[Any, Any]:
    """A point with what stays as it is."""
    whole = dict(point)
    for name, value in fixed.items():
        whole[name] = _filled(point.get(name, {}), value) if isinstance(value, Mapping) else value
    return whole


def _plain(value: Any) -> float | list[float]:
    return np.asarray(value, np.float64).tolist()


def _setting(value: float | list[float]) -> float | tuple[float, ...]:
    return tuple(value) if isinstance(value, list) else value
