"""What a recipe means in its dialect: the method, its options, the models and the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxmerge import methods
from jaxmerge.methods import MergeMethod
from jaxmerge.recipes.dialect import (
    MERGEKIT,
    PARAMETERS,
    MethodDialect,
    library_name,
    mergekit_name,
)
from jaxmerge.recipes.errors import Problem, RecipeError, did_you_mean, place
from jaxmerge.recipes.reference import ModelReference
from jaxmerge.recipes.schema import Recipe, Setting


@dataclass(frozen=True)
class Parameters:
    """The numbers of a recipe by the library's names, in their order of precedence.

    Attributes:
        models: what is set for each model alone.
        shared: what is set for all; a tuple holds one value per model.
        defaults: what holds where nothing is set.
    """

    models: tuple[Mapping[str, Setting], ...]
    shared: Mapping[str, Setting]
    defaults: Mapping[str, float]

    def value_for(
        self, name: str, tensor_name: str | None = None, model_index: int | None = None
    ) -> float | None:
        """Returns the value that one tensor of one model sees: the model's, else the shared one.

        Args:
            name: the library's name of the hyperparameter.
            tensor_name: the tensor; None for the value that holds for all.
            model_index: which of the merged models; None for what all of them share.

        Returns:
            The number, or None where nothing is set and there is no default.
        """
        levels: list[Mapping[str, Setting]] = [self.shared, self.defaults]
        if model_index is not None:
            levels.insert(0, self.models[model_index])
        for level in levels:
            if name in level:
                value = _evaluate(level[name], tensor_name, model_index)
                if value is not None:
                    return value
        return None

    def values_for(self, name: str, tensor_name: str | None = None) -> float | list[float] | None:
        """Returns one number, or one per model where the models' differ in where they come from."""
        if any(name in own for own in self.models) or isinstance(self.shared.get(name), tuple):
            values = [self.value_for(name, tensor_name, i) for i in range(len(self.models))]
            return [value for value in values if value is not None]
        return self.value_for(name, tensor_name)


@dataclass(frozen=True)
class Resolved:
    """A recipe whose every name is looked up.

    Attributes:
        recipe: what was resolved.
        method: the merge method with the dialect's options.
        options: all its static options.
        models: the models to merge, in order (in the mergekit dialect without the base, where the
            base is no model).
        base: what the method gets as its base (which it may ignore), or None.
        parameters: where each number comes from.
        hyperparameters: for the whole model: Python floats, or lists of one per model.
        dtype: the dtype of arithmetic that mergekit would use, here that of the output unless
            `out_dtype` is set; None to keep each tensor's own.
        out_dtype: the dtype of the output.
        notes: remarks for the user.
    """

    recipe: Recipe
    method: MergeMethod
    options: Mapping[str, Any]
    models: tuple[ModelReference, ...]
    base: ModelReference | None
    parameters: Parameters
    hyperparameters: Mapping[str, float | list[float]]
    dtype: str | None
    out_dtype: str | None
    notes: tuple[str, ...]

    def hyperparameters_for(self, tensor_name: str | None = None) -> dict[str, float | list[float]]:
        """Returns the hyperparameters that one tensor is merged with."""
        return _hyperparameters(self.method, self.parameters, tensor_name)

    @property
    def donor(self) -> ModelReference:
        """Whose tensor names all must have, and whose integer and boolean tensors are carried."""
        return self.base or self.models[0]

    @property
    def written_dtype(self) -> str | None:
        """The dtype of merged tensors in the output; None to keep the donor's."""
        return self.out_dtype or self.dtype

    def to_dict(self) -> dict[str, Any]:
        """Returns what decides the result, as plain data that JSON can hold."""
        return {
            "dialect": self.recipe.dialect,
            "method": self.method.name,
            "options": dict(self.options),
            "models": [str(model) for model in self.models],
            "base": None if self.base is None else str(self.base),
            "hyperparameters": dict(self.hyperparameters),
            "dtype": self.written_dtype,
        }


def resolve(recipe: Recipe) -> Resolved:
    """Looks up the method, decides which models are merged, and fills in every number.

    Reads no file.

    Args:
        recipe: as `schema.parse` returns it.

    Raises:
        RecipeError: with every problem of the meaning, each at its line: an unknown method,
            parameter or option, a missing base or value, too few models, a list of the wrong
            length, a number out of bounds.

    >>> from jaxmerge.recipes.schema import parse
    >>> resolved = resolve(parse('''
    ... merge_method: ties
    ... base_model: base
    ... models:
    ... - {model: a, parameters: {weight: 1, density: 0.5}}
    ... - {model: b, parameters: {weight: 0.3}}
    ... '''))
    >>> resolved.hyperparameters["weight"], resolved.hyperparameters["density"]
    ([1.0, 0.3], [0.5, 1.0])
    >>> resolved.options["scope"]
    'tensor'
    """
    return _Resolver(recipe).resolve()


def _evaluate(setting: Setting, tensor_name: str | None, model_index: int | None) -> float | None:
    # Gradients over layers and values chosen by a filter on `tensor_name` will be settings too.
    if isinstance(setting, tuple):
        return None if model_index is None else setting[model_index]
    return setting


def _hyperparameters(
    method: MergeMethod, parameters: Parameters, tensor_name: str | None
) -> dict[str, float | list[float]]:
    found = {name: parameters.values_for(name, tensor_name) for name in method.hyperparams}
    return {name: value for name, value in found.items() if value is not None}


class _Resolver:
    """Collects problems and notes while a recipe is looked up."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.strict = recipe.dialect == "jaxmerge"
        self.peer = MERGEKIT.get(recipe.merge_method) if not self.strict else None
        self.problems: list[Problem] = []
        self.notes = list(recipe.notes)

    def resolve(self) -> Resolved:
        recipe = self.recipe
        method, options = self._method()
        models, base = self._models(method)
        parameters = self._parameters(method, models)
        self._raise()
        self._check_values(method, parameters, models)
        self._raise()
        references = tuple(self._reference(index) for index in models)
        self._note_repeats(references)
        if recipe.dtype in ("float16", "bfloat16") and not self.strict:
            self._note(
                "merged in float32 arithmetic and then rounded; mergekit may round tensors to "
                f"{recipe.dtype} first",
                "dtype",
            )
        return Resolved(
            recipe=recipe,
            method=method,
            options=options,
            models=references,
            base=base,
            parameters=parameters,
            hyperparameters=_hyperparameters(method, parameters, None),
            dtype=recipe.dtype,
            out_dtype=recipe.out_dtype,
            notes=tuple(self.notes),
        )

    # The method

    def _method(self) -> tuple[MergeMethod, dict[str, Any]]:
        name = self.recipe.merge_method
        registered = methods.names()
        if name not in registered:
            if name in MERGEKIT:
                text = f"method {name!r} is not supported yet; there are: {', '.join(registered)}"
            else:
                text = f"unknown method {name!r}{did_you_mean(name, [*registered, *MERGEKIT])}"
            self._problem(text, "merge_method")
            self._raise()
        constructor = methods.get(name)
        options = dict(self.recipe.options)
        if not self.strict:
            if options:
                self._problem("`options` needs `dialect: jaxmerge`", "options")
            options = self.peer.options_for(self._switches(self.peer)) if self.peer else {}
            if self.peer is None:
                self._note(
                    f"mergekit has no method {name!r}: the library's is meant", "merge_method"
                )
        defaults = methods.options(constructor)
        for key in options:
            if key not in defaults:
                hint = did_you_mean(key, defaults) if defaults else "; it has none"
                self._problem(f"{name} has no option {key!r}{hint}", "options", key)
        self._raise()
        try:
            method = constructor(**options)
        except (TypeError, ValueError) as error:
            self._problem(str(error), "options", *list(options)[:1])
            raise RecipeError(self.problems, filename=self.recipe.filename) from error
        needed = [name for name, extra in method.extras.items() if extra.required]
        if needed:
            meaning = method.extras[needed[0]].meaning
            self._problem(
                f"{name} needs {meaning}, which a recipe cannot give; call jaxmerge.merge from Python",
                "merge_method",
            )
            self._raise()
        return method, {**defaults, **options}

    def _switches(self, peer: MethodDialect) -> dict[str, bool]:
        """Returns the flags of the recipe that choose the structure of the method."""
        given = {k: v for k, v in self.recipe.parameters.items() if k in peer.switches}
        for key, value in given.items():
            if value not in (0.0, 1.0):
                self._problem(f"{key!r} is a flag (true or false)", "parameters", key)
        return {key: value == 1.0 for key, value in given.items()}

    # The models

    def _models(self, method: MergeMethod) -> tuple[list[int | None], ModelReference | None]:
        """Returns what is merged (indices into `models`; None for the base) and the base."""
        base = self.recipe.base_model
        models: list[int | None] = list(range(len(self.recipe.models)))
        listed = [i for i in range(len(models)) if self.recipe.models[i].model.same(base)]
        if base is None and (method.base if self.peer is None else self.peer.base) == "required":
            self._problem(f"{method.name} needs `base_model`", "merge_method")
        if self.peer is not None and self.peer.base == "source":
            if base is not None and not listed:
                models.append(None)
                self._note(f"{method.name} merges the base as one more model", "base_model")
            # The library would read a base as an origin where the method can have one.
            base = base if method.base == "unused" else None
        elif self.peer is not None and listed:
            models = [i for i in models if i not in listed]
            own = any(self.recipe.models[i].parameters for i in listed)
            self._note(
                "the base is listed among the models and is not merged as one"
                + ("; its parameters have no effect" if own else ""),
                *("models", listed[0]),
            )
        elif listed:
            self._note("the base is also merged as one of the models", "models", listed[0])
        if self.strict and method.base == "unused" and base is not None:
            self._note(f"{method.name} does not use the base", "base_model")
        self._check_count(method, models)
        return models, base

    def _check_count(self, method: MergeMethod, models: Sequence[int | None]) -> None:
        low, high = method.models
        # The library counts a base that is one end of an arc.
        counted = method.base == "source" and self.recipe.base_model is not None
        count = len(models) + counted
        if low <= count and (high is None or count <= high):
            return
        wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low}-{high}"
        what = "model" if low == 1 and high in (1, None) else "models"
        if counted:
            what += ", the base counted"
        elif method.base in ("required", "optional") and self.recipe.base_model is not None:
            what += " beside the base"
        self._problem(f"{method.name} takes {wanted} {what}; found {count}", "models")

    def _reference(self, index: int | None) -> ModelReference:
        if index is None:
            assert self.recipe.base_model is not None
            return self.recipe.base_model
        return self.recipe.models[index].model

    def _note_repeats(self, references: Sequence[ModelReference]) -> None:
        for i, reference in enumerate(references):
            if any(reference.same(other) for other in references[:i]):
                counts = "; mergekit would count it once" if not self.strict else ""
                self._note(f"{str(reference)!r} is merged more than once{counts}", "models")

    # The numbers

    def _parameters(self, method: MergeMethod, models: Sequence[int | None]) -> Parameters:
        shared = self._level(method, self.recipe.parameters, ("parameters",))
        own: list[Mapping[str, Setting]] = []
        for index in models:
            path = ("models", index, "parameters") if index is not None else ("base_model",)
            given = {} if index is None else self.recipe.models[index].parameters
            own.append(self._level(method, given, path))
        return Parameters(tuple(own), shared, self._defaults(method))

    def _defaults(self, method: MergeMethod) -> dict[str, float]:
        defaults = {name: spec.default for name, spec in method.hyperparams.items()}
        for key, value in (self.peer.parameters if self.peer else {}).items():
            name = library_name(key)
            if value is None:
                defaults.pop(name, None)
            elif name in defaults:
                defaults[name] = value
        return defaults

    def _level(
        self, method: MergeMethod, given: Mapping[str, Setting], path: tuple[Any, ...]
    ) -> dict[str, Setting]:
        """Renames one mapping of parameters to the library's names and checks each entry."""
        level: dict[str, Setting] = {}
        for key, setting in given.items():
            where = (*path, key)
            name = self._library_name(method, key, where)
            if name is None:
                continue
            if name in level:
                self._problem(f"{mergekit_name(name)!r} and {name!r} are one parameter", *where)
            spec = method.hyperparams[name]
            if path[0] == "models" and spec.scope == "shared":
                self._problem(
                    f"{key!r} is shared by all models: give it under the top-level `parameters`",
                    *where,
                )
                continue
            if isinstance(setting, tuple) and not self._list_is_valid(name, spec, setting, where):
                continue
            level[name] = setting
        return level

    def _library_name(self, method: MergeMethod, key: str, where: tuple[Any, ...]) -> str | None:
        name = library_name(key)
        if self.peer is None:
            if name in method.hyperparams:
                return name
            valid: list[str] = list(method.hyperparams)
        else:
            if key in self.peer.switches:
                if where[0] == "models":
                    self._problem(
                        f"{key!r} is shared by all models: give it under the top-level `parameters`",
                        *where,
                    )
                return None
            valid = [k for k in self.peer.parameters if library_name(k) in method.hyperparams]
            if key in valid:
                return name
            valid += self.peer.switches
            if mergekit_name(key) != key and mergekit_name(key) in valid:
                self._problem(f"mergekit calls {key!r} {mergekit_name(key)!r}", *where)
                return None
            if key in PARAMETERS:
                self._note(f"{key!r} has no effect on {method.name}", *where)
                return None
        hint = did_you_mean(key, valid) if valid else "; it has none"
        self._problem(f"{method.name} has no parameter {key!r}{hint}", *where)
        return None

    def _list_is_valid(
        self, name: str, spec: Any, setting: tuple[float, ...], where: tuple[Any, ...]
    ) -> bool:
        count = len(self.recipe.models)
        if not self.strict:
            text = (
                "a list is a gradient over layers, which is not supported yet; for one value per "
                "model set it under each model"
            )
        elif where[0] == "models":
            text = f"{name!r} of one model is one number, found a list of {len(setting)}"
        elif spec.scope == "shared":
            text = f"{name!r} is one number shared by all models, found a list of {len(setting)}"
        elif len(setting) != count:
            text = f"{name!r} lists {len(setting)} values for {count} models"
        else:
            return True
        self._problem(text, *where)
        return False

    def _check_values(
        self, method: MergeMethod, parameters: Parameters, models: Sequence[int | None]
    ) -> None:
        for name, spec in method.hyperparams.items():
            everywhere: list[int | None] = [None]
            per_model = any(name in own for own in parameters.models) or name not in (
                parameters.shared.keys() | parameters.defaults.keys()
            )
            if spec.scope == "model" and (
                per_model or isinstance(parameters.shared.get(name), tuple)
            ):
                everywhere = list(range(len(models)))
            for position in everywhere:
                value = parameters.value_for(name, None, position)
                where = self._where(name, parameters, models, position)
                if value is None:
                    needs = f"{method.name} needs {mergekit_name(name)!r}"
                    if position is not None:
                        needs += f" for {str(self._reference(models[position]))!r}"
                    self._problem(needs, *where)
                else:
                    self._check_value(name, spec, value, where)

    def _check_value(self, name: str, spec: Any, value: float, where: tuple[Any, ...]) -> None:
        shown = where[-1] if where and where[-1] in (name, mergekit_name(name)) else name
        if spec.kind == "flag" and value not in (0.0, 1.0):
            self._problem(f"{shown!r} is a flag (true or false), found {value:g}", *where)
        elif spec.kind == "index" and not value.is_integer():
            self._problem(f"{shown!r} is a whole number, found {value:g}", *where)
        elif not spec.low <= value <= spec.high:
            self._problem(
                f"{shown!r} must lie in [{spec.low:g}, {spec.high:g}], found {value:g}", *where
            )

    def _where(
        self, name: str, parameters: Parameters, models: Sequence[int | None], position: int | None
    ) -> tuple[Any, ...]:
        """Returns the path of the setting that decides, for its line."""
        if position is not None:
            index = models[position]
            if index is None:
                return ("base_model",)
            own = self.recipe.models[index].parameters
            for key in (name, mergekit_name(name)):
                if key in own:
                    return ("models", index, "parameters", key)
            if name not in parameters.shared:
                return ("models", index)
        for key in (name, mergekit_name(name)):
            if key in self.recipe.parameters:
                return ("parameters", key)
        return ("merge_method",)

    # Problems and notes

    def _problem(self, message: str, *path: Any) -> None:
        self.problems.append(Problem(self.recipe.line(*path), message))

    def _note(self, message: str, *path: Any) -> None:
        self.notes.append(place(self.recipe.filename, self.recipe.line(*path), message))

    def _raise(self) -> None:
        if self.problems:
            raise RecipeError(self.problems, filename=self.recipe.filename)
