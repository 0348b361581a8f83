"""What a recipe means in its dialect: the method, the models merged together and their numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

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
from jaxmerge.recipes.parameters import Level, Parameters, Path, hyperparameters
from jaxmerge.recipes.reference import ModelReference
from jaxmerge.recipes.schema import OutputSlice, Recipe, SliceSource, Source
from jaxmerge.recipes.settings import Choice, Setting, numbers, plain_setting
from jaxmerge.tree import matches

_SHARED = "is shared by all models: give it under the top-level `parameters`"


@dataclass(frozen=True)
class PartModel:
    """A model among those merged together.

    Attributes:
        reference: the model.
        layers: the range of its layers, the end not counted; None for all of the model.
        path: where it stands in the recipe.
    """

    reference: ModelReference
    layers: tuple[int, int] | None
    path: Path


@dataclass(frozen=True)
class Part:
    """Models that are merged together: whole ones, or layers of each for a slice of the output.

    Attributes:
        module: the module of the output that this is a part of; None: of the whole output.
        slice: which slice of the output (from 0); None where whole models are merged.
        models: the models to merge, in order (in the mergekit dialect without the base, where the
            base is no model).
        base: what the method gets as its base (which it may ignore), or None.
        parameters: where each number comes from.
        path: where the part stands in the recipe.
    """

    module: str | None
    slice: int | None
    models: tuple[PartModel, ...]
    base: PartModel | None
    parameters: Parameters
    path: Path

    @property
    def sources(self) -> tuple[PartModel, ...]:
        """The base, if there is one, and the models."""
        return self.models if self.base is None else (self.base, *self.models)


@dataclass(frozen=True)
class ResolvedBlock:
    """Tensors with a method of their own.

    Attributes:
        patterns: of their names in the output.
        resolved: the recipe as if it were theirs alone, with the same parts.
    """

    patterns: tuple[str, ...]
    resolved: Resolved

    def holds(self, tensor: str) -> bool:
        """Whether one of the patterns matches a name."""
        return any(matches(tensor, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Resolved:
    """A recipe whose every name is looked up.

    Attributes:
        recipe: what was resolved.
        method: the merge method with the dialect's options.
        options: all its static options.
        parts: what is merged with what, in the order of the output.
        models: every model that is merged, in the order of the first use.
        base: the base of the first part, or None.
        hyperparameters: of the first part as a whole, where no layer or name is told: Python
            floats, or lists of one per model.
        dtype: the dtype of arithmetic that mergekit would use, here that of the output unless
            `out_dtype` is set; None to keep each tensor's own.
        out_dtype: the dtype of the output.
        notes: remarks for the user.
        blocks: tensors that are merged otherwise, the first match first.
    """

    recipe: Recipe
    method: MergeMethod
    options: Mapping[str, Any]
    parts: tuple[Part, ...]
    hyperparameters: Mapping[str, float | list[float]]
    dtype: str | None
    out_dtype: str | None
    notes: tuple[str, ...]
    blocks: tuple[ResolvedBlock, ...] = ()
    _switched: Mapping[tuple[bool, ...], tuple[MergeMethod, Mapping[str, Any]]] = field(
        default_factory=dict, repr=False
    )

    @property
    def models(self) -> tuple[ModelReference, ...]:
        if len(self.parts) == 1:
            return tuple(model.reference for model in self.parts[0].models)
        return tuple(dict.fromkeys(m.reference for part in self.parts for m in part.models))

    @property
    def base(self) -> ModelReference | None:
        return None if self.parts[0].base is None else self.parts[0].base.reference

    @property
    def uniform(self) -> bool:
        """Whether whole models are merged, and every tensor with the same numbers."""
        (first, *others) = self.parts
        whole = not others and first.slice is None and first.module is None
        return whole and not first.parameters.varies and not self.blocks

    @property
    def donor(self) -> ModelReference:
        """Whose tensors decide the output's, and whose other files are copied."""
        if self.parts[0].slice is not None or self.parts[0].module is not None:
            return self.recipe.base_model or self.parts[0].sources[0].reference
        return self.base or self.models[0]

    @property
    def aligned_to(self) -> ModelReference:
        """The model in whose order an alignment brings the others."""
        named = None if self.recipe.align is None else self.recipe.align.to
        wanted = named or self.recipe.base_model or self.models[0]
        sources = [model.reference for model in self.parts[0].sources]
        return next((one for one in sources if one.same(wanted)), wanted)

    @property
    def written_dtype(self) -> str | None:
        """The dtype of merged tensors in the output; None to keep the sources'."""
        return self.out_dtype or self.dtype

    def merge_for(
        self, part: Part, tensor: str, at: float
    ) -> tuple[MergeMethod, Mapping[str, Any]]:
        """Returns the method that merges a tensor, where switches set its structure.

        Args:
            part: the part that the tensor belongs to.
            tensor: the output's name.
            at: where the tensor's layer lies in the part, from 0 to 1.
        """
        chosen = tuple(
            part.parameters.value_for(name, tensor, at=at, discrete=True) == 1.0
            for name in switches_of(self.recipe)
        )
        return self._switched.get(chosen, (self.method, self.options))

    def to_dict(self) -> dict[str, Any]:
        """Returns what decides the result, as plain data that JSON can hold."""
        decided: dict[str, Any] = {
            "dialect": self.recipe.dialect,
            "method": self.method.name,
            "options": dict(self.options),
            "models": [str(model) for model in self.models],
            "base": None if self.base is None else str(self.base),
            "hyperparameters": dict(self.hyperparameters),
            "dtype": self.written_dtype,
        }
        align = self.recipe.align
        if align is not None:
            decided["align"] = {**align.model_dump(), "to": str(self.aligned_to)}
        if not self.uniform:
            del decided["hyperparameters"]
            decided["parts"] = [_plain_part(part) for part in self.parts]
        if self.blocks:
            decided["blocks"] = [
                {"tensors": list(block.patterns), **block.resolved.to_dict()}
                for block in self.blocks
            ]
        return decided


def switches_of(recipe: Recipe) -> tuple[str, ...]:
    """Returns the flags of the recipe's method that choose its structure."""
    peer = MERGEKIT.get(recipe.merge_method) if recipe.dialect == "mergekit" else None
    return () if peer is None else tuple(peer.switches)


def resolve(recipe: Recipe) -> Resolved:
    """Looks up the method, decides which models are merged, and fills in every number.

    Reads no file.

    Args:
        recipe: as `schema.parse` returns it.

    Raises:
        RecipeError: with every problem of the meaning, each at its line: an unknown method,
            parameter or option, a missing base or value, too few models, slices of unequal
            length, a list of the wrong length, a number out of bounds.

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


def _plain_part(part: Part) -> dict[str, Any]:
    def plain_model(model: PartModel) -> dict[str, Any]:
        return {"model": str(model.reference), "layers": model.layers}

    chains = (part.parameters.shared, *part.parameters.models)
    plain: dict[str, Any] = {
        "module": part.module,
        "models": [plain_model(model) for model in part.models],
        "base": None if part.base is None else plain_model(part.base),
        "parameters": [[_plain_level(level) for level in chain] for chain in chains],
        "defaults": dict(part.parameters.defaults),
    }
    return plain


def _plain_level(level: Level) -> dict[str, Any]:
    return {name: plain_setting(setting) for name, setting in level.settings.items()}


class _Resolver:
    """Collects problems and notes while a recipe is looked up.

    Args:
        recipe: the recipe.
        at: where its method, parameters and options stand, which for a block is not at the top.
    """

    def __init__(self, recipe: Recipe, at: Path = ()) -> None:
        self.recipe = recipe
        self.at = at
        self.strict = recipe.dialect == "jaxmerge"
        self.peer = MERGEKIT.get(recipe.merge_method) if not self.strict else None
        self.problems: list[Problem] = []
        self.notes: list[str] = list(recipe.notes)
        # Parameters of all models that stand under one: name -> where.
        self.misplaced: dict[str, Path] = {}

    def resolve(self) -> Resolved:
        recipe = self.recipe
        structures = self._structures()
        method, options = structures[tuple(self.peer.switches.values()) if self.peer else ()]
        parts = tuple(self._parts(method))
        self._raise()
        for part in parts:
            self._check_values(method, part)
            self._note_repeats(part)
        self._check_align(parts[0])
        self._raise()
        for name, where in self.misplaced.items():
            self._note(
                f"{mergekit_name(name)!r} has no effect under a model, as with mergekit: it "
                f"{_SHARED}",
                *where,
            )
        if recipe.dtype in ("float16", "bfloat16") and not self.strict:
            self._note(
                "merged in float32 arithmetic and then rounded; mergekit may round tensors to "
                f"{recipe.dtype} first",
                "dtype",
            )
        blocks = tuple(self._blocks())
        self._raise()
        first = parts[0].parameters
        switched = (first.value_for(name, discrete=True) for name in switches_of(recipe))
        method, options = structures[tuple(value == 1.0 for value in switched)]
        found, _ = hyperparameters(method, first)
        return Resolved(
            recipe=recipe,
            method=method,
            options=options,
            parts=parts,
            hyperparameters={
                name: list(value) if isinstance(value, tuple) else value
                for name, value in found.items()
            },
            dtype=recipe.dtype,
            out_dtype=recipe.out_dtype,
            notes=tuple(dict.fromkeys(self.notes)),
            blocks=blocks,
            _switched=structures,
        )

    def _blocks(self) -> Iterator[ResolvedBlock]:
        """Resolves each block as a recipe with the same models; what is set for these alone is not the block's."""
        bare = tuple(Source(model=one.model) for one in self.recipe.models)
        for i, block in enumerate(self.recipe.blocks):
            update = {
                "merge_method": block.merge_method,
                "parameters": block.parameters,
                "options": block.options,
                "models": bare,
                "blocks": (),
                "align": None,
            }
            recipe = self.recipe.model_copy(update=update)
            recipe._notes = ()
            try:
                resolved = _Resolver(recipe, ("blocks", i)).resolve()
            except RecipeError as error:
                self.problems += [p for p in error.problems if p not in self.problems]
                continue
            self.notes += resolved.notes
            yield ResolvedBlock(block.tensors, resolved)

    def _check_align(self, part: Part) -> None:
        align = self.recipe.align
        if align is None:
            return
        names = [model.reference for model in part.sources]
        if align.to is not None and not any(align.to.same(name) for name in names):
            hint = did_you_mean(str(align.to), map(str, names))
            self._problem(
                f"`align.to`: {str(align.to)!r} is none of the models{hint}", "align", "to"
            )
        method = align.method or ("weight" if align.data is None else "dual")
        if method != "weight" and align.data is None:
            self._problem(
                f"`align`: method {method!r} compares activations: give `data`, a .npz or .npy file "
                "of inputs",
                *("align", "method"),
            )
        if method == "weight" and align.data is not None:
            self._note("`align.data` has no effect on method 'weight'", "align", "data")
        if method != "dual" and align.alpha is not None:
            self._note(f"`align.alpha` has no effect on method {method!r}", "align", "alpha")

    # The method

    def _structures(self) -> dict[tuple[bool, ...], tuple[MergeMethod, Mapping[str, Any]]]:
        """Returns the method and its options at every setting of the switches."""
        name = self.recipe.merge_method
        registered = methods.names()
        if name not in registered:
            if name in MERGEKIT:
                text = f"method {name!r} is not supported yet; there are: {', '.join(registered)}"
            else:
                text = f"unknown method {name!r}{did_you_mean(name, [*registered, *MERGEKIT])}"
            self._problem(text, "merge_method")
            self._raise()
        if not self.strict and self.peer is None:
            self._note(f"mergekit has no method {name!r}: the library's is meant", "merge_method")
        if not self.strict and self.recipe.options:
            self._problem("`options` needs `dialect: jaxmerge`", "options")
        if self.peer is None:
            given = self.recipe.options if self.strict else {}
            return {(): self._constructed(name, dict(given))}
        return {
            tuple(settings.values()): self._constructed(name, self.peer.options_for(settings))
            for settings in _settings_of(self.peer)
        }

    def _constructed(
        self, name: str, options: dict[str, Any]
    ) -> tuple[MergeMethod, Mapping[str, Any]]:
        constructor = methods.get(name)
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

    # The models

    def _parts(self, method: MergeMethod) -> Iterator[Part]:
        recipe = self.recipe
        top = self._level(method, recipe.parameters, ("parameters",))
        if recipe.models:
            yield self._whole(method, None, recipe.models, (), (top,))
        for i, one in enumerate(recipe.slices):
            yield self._slice(method, None, i, one, ("slices", i), (top,))
        for name, module in recipe.modules.items():
            where: Path = ("modules", name)
            levels = (self._level(method, module.parameters, (*where, "parameters")), top)
            if module.models:
                yield self._whole(method, name, module.models, where, levels)
            for i, one in enumerate(module.slices):
                yield self._slice(method, name, i, one, (*where, "slices", i), levels)

    def _whole(
        self,
        method: MergeMethod,
        module: str | None,
        listed: Sequence[Source],
        path: Path,
        levels: tuple[Level, ...],
    ) -> Part:
        """Whole models: `models` of the recipe or of a module."""
        models = [PartModel(s.model, None, (*path, "models", i)) for i, s in enumerate(listed)]
        given = self.recipe.base_model
        base = None if given is None else PartModel(given, None, ("base_model",))
        bases = [model for model in models if model.reference.same(given)]
        at_models = (*path, "models")
        if given is None and (method.base if self.peer is None else self.peer.base) == "required":
            self._problem(f"{method.name} needs `base_model`", "merge_method")
        if self.peer is not None and self.peer.base == "source":
            if base is not None and not bases:
                models.append(base)
                self._note(f"{method.name} merges the base as one more model", "base_model")
            # The library would read a base as an origin where the method can have one.
            base = base if method.base == "unused" else None
        elif self.peer is not None and bases:
            models = [model for model in models if model not in bases]
            own = any(listed[int(model.path[-1])].parameters for model in bases)
            self._note(
                "the base is listed among the models and is not merged as one"
                + ("; its parameters have no effect" if own else ""),
                *bases[0].path,
            )
        elif bases:
            self._note("the base is also merged as one of the models", *bases[0].path)
        if self.strict and method.base == "unused" and given is not None:
            self._note(f"{method.name} does not use the base", "base_model")
        self._check_count(method, len(models), given is not None, at_models)
        settings = [
            {} if model.path == ("base_model",) else listed[int(model.path[-1])].parameters
            for model in models
        ]
        parameters = self._parameters(method, models, settings, levels, len(listed))
        return Part(module, None, tuple(models), base, parameters, at_models)

    def _slice(
        self,
        method: MergeMethod,
        module: str | None,
        index: int,
        given: OutputSlice,
        path: Path,
        levels: tuple[Level, ...],
    ) -> Part:
        """Layers of models: an output slice. The base is one of its sources."""
        models = [
            PartModel(source.model, source.layer_range, (*path, "sources", i))
            for i, source in enumerate(given.sources)
        ]
        self._check_lengths(given.sources, path)
        named = given.base_model or self.recipe.base_model
        role = method.base if self.peer is None else self.peer.base
        base: PartModel | None = None
        if role == "required" and named is None:
            self._problem(f"{method.name} needs `base_model`", "merge_method")
        elif named is not None and role not in ("source", "unused"):
            bases = [model for model in models if model.reference.same(named)]
            if not bases:
                self._problem(
                    f"the base {str(named)!r} is not among the slice's sources; list it there with "
                    "its `layer_range`",
                    *(*path, "base_model") if given.base_model else path,
                )
            base = next(iter(bases), None)
            models = [model for model in models if model not in bases]
        elif named is not None and self.peer is None and method.base == "source":
            base = next((model for model in models if model.reference.same(named)), None)
            models = [model for model in models if model is not base]
        self._check_count(method, len(models), base is not None, (*path, "sources"))
        own = self._level(method, given.parameters, (*path, "parameters"))
        settings = [given.sources[int(model.path[-1])].parameters for model in models]
        parameters = self._parameters(method, models, settings, (own, *levels), len(models))
        return Part(module, index, tuple(models), base, parameters, path)

    def _check_lengths(self, sources: Sequence[SliceSource], path: Path) -> None:
        lengths = [end - first for first, end in (source.layer_range for source in sources)]
        for i, length in enumerate(lengths):
            if length != lengths[0]:
                self._problem(
                    "the sources of a slice have equally many layers: the first has "
                    f"{lengths[0]}, this one {length}",
                    *(*path, "sources", i, "layer_range"),
                )

    def _check_count(self, method: MergeMethod, merged: int, has_base: bool, path: Path) -> None:
        low, high = method.models
        # The library counts a base that is one end of an arc.
        counted = method.base == "source" and has_base
        count = merged + counted
        if low <= count and (high is None or count <= high):
            return
        wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low}-{high}"
        what = "model" if low == 1 and high in (1, None) else "models"
        if counted:
            what += ", the base counted"
        elif method.base in ("required", "optional") and has_base:
            what += " beside the base"
        self._problem(f"{method.name} takes {wanted} {what}; found {count}", *path)

    def _note_repeats(self, part: Part) -> None:
        models = part.models
        for i, model in enumerate(models):
            if any(model.reference.same(other.reference) for other in models[:i]):
                refuses = "; mergekit refuses that" if not self.strict else ""
                text = f"{str(model.reference)!r} is merged more than once{refuses}"
                self._note(text, *part.path)

    # The numbers

    def _parameters(
        self,
        method: MergeMethod,
        models: Sequence[PartModel],
        settings: Sequence[Mapping[str, Setting]],
        levels: tuple[Level, ...],
        listed: int,
    ) -> Parameters:
        own = [
            self._level(method, given, (*model.path, "parameters"), of_model=True)
            for model, given in zip(models, settings, strict=True)
        ]
        apart = {name for level in own for name in level.settings}
        if not self.strict:
            chains = tuple((level, *levels) for level in own)
            return Parameters(chains, levels, self._defaults(method), frozenset(apart))
        # There a list holds one number per model.
        lists = {
            name
            for level in levels
            for name, setting in level.settings.items()
            if _is_list(setting) and self._list_fits(method, name, setting, level, listed)
        }
        chains = tuple(
            (level, *(_one_of_each(shared, i) for shared in levels)) for i, level in enumerate(own)
        )
        return Parameters(
            chains,
            tuple(_one_of_each(shared, None) for shared in levels),
            self._defaults(method),
            frozenset(apart | lists),
        )

    def _list_fits(
        self, method: MergeMethod, name: str, setting: Any, level: Level, listed: int
    ) -> bool:
        if method.hyperparams[name].scope == "shared":
            text = f"{name!r} is one number shared by all models, found a list of {len(setting)}"
        elif len(setting) != listed:
            text = f"{name!r} lists {len(setting)} values for {listed} models"
        else:
            return True
        self._problem(text, *level.place(name))
        return False

    def _defaults(self, method: MergeMethod) -> dict[str, float]:
        defaults = {name: spec.default for name, spec in method.hyperparams.items()}
        for key, value in (self.peer.parameters if self.peer else {}).items():
            name = library_name(key)
            if value is None:
                defaults.pop(name, None)
            elif name in defaults:
                defaults[name] = value
        if self.peer is not None:
            defaults |= {name: float(value) for name, value in self.peer.switches.items()}
        return defaults

    def _level(
        self,
        method: MergeMethod,
        given: Mapping[str, Setting],
        path: Path,
        *,
        of_model: bool = False,
    ) -> Level:
        """Renames one mapping of parameters to the library's names and checks each entry."""
        settings: dict[str, Setting] = {}
        keys: dict[str, str] = {}
        for key, setting in given.items():
            where = (*path, key)
            name = self._library_name(method, key, where, of_model)
            if name is None:
                continue
            if name in settings:
                self._problem(f"{mergekit_name(name)!r} and {name!r} are one parameter", *where)
            if self.strict and not self._is_number(name, setting, where, of_model):
                continue
            settings[name], keys[name] = setting, key
        return Level(path, settings, keys)

    def _library_name(
        self, method: MergeMethod, key: str, where: Path, of_model: bool
    ) -> str | None:
        name = library_name(key)
        if self.peer is None:
            valid: list[str] = list(method.hyperparams)
            known = name in method.hyperparams
        else:
            valid = [k for k in self.peer.parameters if library_name(k) in method.hyperparams]
            valid += self.peer.switches
            known = key in valid
        if known:
            shared = name not in method.hyperparams or method.hyperparams[name].scope == "shared"
            if not (of_model and shared):
                return name
            if self.strict:
                self._problem(f"{key!r} {_SHARED}", *where)
            else:
                self.misplaced.setdefault(name, where)
            return None
        if self.peer is not None and mergekit_name(key) != key and mergekit_name(key) in valid:
            self._problem(f"mergekit calls {key!r} {mergekit_name(key)!r}", *where)
            return None
        if self.peer is not None and key in PARAMETERS:
            self._note(f"{key!r} has no effect on {method.name}", *where)
            return None
        hint = did_you_mean(key, valid) if valid else "; it has none"
        self._problem(f"{method.name} has no parameter {key!r}{hint}", *where)
        return None

    def _is_number(self, name: str, setting: Setting, where: Path, of_model: bool) -> bool:
        """In the library's dialect there is no gradient: a list is one number per model."""
        lists = [setting] if of_model else []
        if isinstance(setting, tuple):
            lists += [choice.value for choice in setting if isinstance(choice, Choice)]
        for found in lists:
            if _is_list(found):
                text = f"{name!r} of one model is one number, found a list of {len(found)}"
                self._problem(text, *where)
                return False
        return True

    def _check_values(self, method: MergeMethod, part: Part) -> None:
        parameters = part.parameters
        for name in switches_of(self.recipe):
            for setting, where in parameters.settings(name):
                if any(value not in (0.0, 1.0) for value in numbers(setting)):
                    self._problem(f"{name!r} is a flag (true or false)", *where)
        for name, spec in method.hyperparams.items():
            for setting, where in parameters.settings(name):
                for value in numbers(setting):
                    self._check_value(str(where[-1]), spec, value, where)
            models: Sequence[int | None] = [None]
            if spec.scope == "model":
                models = range(len(part.models))
            for model in models:
                chain = parameters.shared if model is None else parameters.models[model]
                if name in parameters.defaults or any(name in one.settings for one in chain):
                    continue
                needs = f"{method.name} needs {mergekit_name(name)!r}"
                if name in self.misplaced:
                    self._problem(f"{name!r} {_SHARED}", *self.misplaced[name])
                elif model is None:
                    self._problem(needs, "merge_method")
                else:
                    one = part.models[model]
                    self._problem(f"{needs} for {str(one.reference)!r}", *one.path)

    def _check_value(self, shown: str, spec: Any, value: float, where: Path) -> None:
        if spec.kind == "flag" and value not in (0.0, 1.0):
            self._problem(f"{shown!r} is a flag (true or false), found {value:g}", *where)
        elif spec.kind == "index" and not value.is_integer():
            self._problem(f"{shown!r} is a whole number, found {value:g}", *where)
        elif not spec.low <= value <= spec.high:
            self._problem(
                f"{shown!r} must lie in [{spec.low:g}, {spec.high:g}], found {value:g}", *where
            )

    # Problems and notes

    def _line(self, path: Path) -> int | None:
        own = path[:1] in (("merge_method",), ("parameters",), ("options",))
        return self.recipe.line(*(self.at if own else ()), *path)

    def _problem(self, message: str, *path: Any) -> None:
        problem = Problem(self._line(path), message)
        if problem not in self.problems:
            self.problems.append(problem)

    def _note(self, message: str, *path: Any) -> None:
        self.notes.append(place(self.recipe.filename, self._line(path), message))

    def _raise(self) -> None:
        if self.problems:
            raise RecipeError(self.problems, filename=self.recipe.filename)


def _settings_of(peer: MethodDialect) -> Iterator[dict[str, bool]]:
    """Gives every setting of a method's switches."""
    for values in itertools.product((False, True), repeat=len(peer.switches)):
        yield dict(zip(peer.switches, values, strict=True))


def _is_list(setting: object) -> TypeGuard[tuple[float, ...]]:
    return isinstance(setting, tuple) and not isinstance(setting[0], Choice)


def _one_of_each(level: Level, model: int | None) -> Level:
    """A level as one model sees it (None: all of them), of whose lists it takes its own number."""
    settings = {
        name: setting[model] if _is_list(setting) and model is not None else setting
        for name, setting in level.settings.items()
        if not (_is_list(setting) and (model is None or model >= len(setting)))
    }
    return level._replace(settings=settings)
