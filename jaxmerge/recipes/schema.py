"""The recipe: what a merge file may hold, as pydantic models that remember their lines."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from jaxmerge.recipes import source_map
from jaxmerge.recipes.dialect import PARAMETERS
from jaxmerge.recipes.errors import Problem, RecipeError, did_you_mean, place
from jaxmerge.recipes.reference import ModelReference, nearest_name, parse_reference
from jaxmerge.recipes.source_map import SourceMap
from jaxmerge.tree import nearest

Setting = float | tuple[float, ...]

DTYPES = ("float32", "float16", "bfloat16")

# Keys of the peer that change the result and that a later version will understand.
_LATER = frozenset({"slices", "modules", "tokenizer_source", "tokenizer", "chat_template"})
# Keys that recipes carry though they cannot change the merged tensors: switches of the peer's
# command, and the precision of a temporary mask.
_NO_EFFECT = frozenset(
    (
        *("int8_mask", "name", "allow_crimes", "async_write", "clone_tensors", "cuda", "gpu_rich"),
        *("lazy_unpickle", "lora_merge_cache", "low_cpu_memory", "multi_gpu", "num_threads"),
        *("quiet", "read_to_gpu", "transformers_cache", "trust_remote_code", "verbosity"),
        *("write_model_card", "write_threads"),
    )
)
_NO_EFFECT_PARAMETERS = frozenset({"int8_mask"})
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _setting(value: object) -> Setting:
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("the list is empty")
        return tuple(_number(item) for item in value)
    return _number(value)


def _number(value: object) -> float:
    if isinstance(value, Mapping) and "value" in value:
        raise ValueError("values chosen by `filter` are not supported yet")
    # YAML 1.1 reads 1e-5 (no point) as text.
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, list | tuple):
        raise ValueError("a list within a list")
    if not isinstance(value, bool | int | float):
        raise ValueError("no value is given" if value is None else f"{value!r} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number


def _dtype(value: object) -> str:
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"unknown dtype {value!r}{did_you_mean(str(name), DTYPES)}")
    return name


def _some(value: object) -> object:
    if isinstance(value, list | tuple) and not value:
        raise ValueError("the list is empty; a merge needs at least one model")
    return value


_Reference = Annotated[ModelReference, BeforeValidator(parse_reference)]
_Parameters = dict[str, Annotated[Setting, BeforeValidator(_setting)]]
_Dtype = Annotated[str, BeforeValidator(_dtype)]


class Source(BaseModel):
    """One model of a recipe, with what is set for it alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    model: _Reference
    parameters: _Parameters = Field(default_factory=dict)


class Recipe(BaseModel):
    """A merge as written, before names are looked up.

    Numbers are finite floats (a flag is 0.0 or 1.0); lists are tuples. `jaxmerge.recipes.resolve`
    says what they mean.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    dialect: Literal["mergekit", "jaxmerge"] = "mergekit"
    merge_method: str
    base_model: _Reference | None = None
    models: Annotated[tuple[Source, ...], BeforeValidator(_some)]
    parameters: _Parameters = Field(default_factory=dict)
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    dtype: _Dtype | None = None
    out_dtype: _Dtype | None = None

    _source: SourceMap = PrivateAttr(default_factory=lambda: SourceMap("<recipe>", {}))
    _folder: Path | None = PrivateAttr(default=None)
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def filename(self) -> str:
        """The recipe's name in errors."""
        return self._source.filename

    @property
    def folder(self) -> Path | None:
        """The folder of the recipe's file, where models are looked for second."""
        return self._folder

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on what was accepted and has no effect."""
        return self._notes

    def line(self, *path: str | int) -> int | None:
        """Returns the line (from 1) of a part, as `line("models", 0, "parameters", "weight")`."""
        return self._source.line(path)


def parse(text: str, *, filename: str = "<recipe>") -> Recipe:
    """Parses a recipe.

    Args:
        text: YAML.
        filename: the name to show in errors.

    Raises:
        RecipeError: with every problem of the form, each at its line.

    >>> recipe = parse("merge_method: linear\\nmodels:\\n- model: a\\n- model: b\\n")
    >>> [str(source.model) for source in recipe.models]
    ['a', 'b']
    >>> parse("merge_methd: linear\\nmodels: [{model: a}]", filename="soup.yaml")
    Traceback (most recent call last):
    ...
    jaxmerge.recipes.errors.RecipeError: soup.yaml:1: unknown key 'merge_methd'; did you mean ...
    """
    data, source = source_map.load(text, filename=filename)
    if not isinstance(data, dict):
        raise RecipeError(
            f"a recipe is a mapping, found {_kind(data)}", filename=filename, line=source.line(())
        )
    problems: list[Problem] = []
    notes: list[str] = []
    kept = _without_extras(data, source, problems, notes)
    try:
        recipe = Recipe.model_validate(kept)
    except ValidationError as error:
        problems += _problems(error, source)
    if "slices" in data or "modules" in data:
        problems = [problem for problem in problems if problem.message != "`models` is missing"]
    if problems:
        raise RecipeError(problems, filename=filename)
    recipe._source = source
    recipe._notes = tuple(notes)
    return recipe


def read(path: str | Path) -> Recipe:
    """Reads a recipe's file.

    Raises:
        RecipeError: as `parse`, and where the file cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest_name(path)
        hint = f"; did you mean {near!r}?" if near else ""
        raise RecipeError(f"no such file{hint}", filename=str(path)) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text ({error.reason})", filename=str(path)) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", filename=str(path)) from None
    recipe = parse(text, filename=str(path))
    recipe._folder = path.absolute().parent
    return recipe


def dump(recipe: Recipe) -> str:
    """Returns the recipe as YAML text that `parse` reads back to an equal one.

    >>> print(dump(Recipe(merge_method="slerp", base_model="a", models=[{"model": "b"}],
    ...                   parameters={"t": 0.25})), end="")
    merge_method: slerp
    base_model: a
    models:
    - model: b
    parameters:
      t: 0.25
    """
    data: dict[str, Any] = {}
    if recipe.dialect != "mergekit":
        data["dialect"] = recipe.dialect
    data["merge_method"] = recipe.merge_method
    if recipe.base_model is not None:
        data["base_model"] = str(recipe.base_model)
    data["models"] = [
        {"model": str(source.model)}
        | ({"parameters": _plain(source.parameters)} if source.parameters else {})
        for source in recipe.models
    ]
    data["parameters"] = _plain(recipe.parameters)
    data["options"] = dict(recipe.options)
    data |= {"dtype": recipe.dtype, "out_dtype": recipe.out_dtype}
    kept = {key: value for key, value in data.items() if value not in (None, {})}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def _plain(parameters: Mapping[str, Setting]) -> dict[str, float | list[float]]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in parameters.items()
    }


def _without_extras(
    data: dict[str, Any], source: SourceMap, problems: list[Problem], notes: list[str]
) -> dict[str, Any]:
    """Takes out what is empty, without effect, or of a later version, and says so."""
    kept: dict[str, Any] = {}
    for key, value in data.items():
        if key in _LATER:
            if value is not None:
                problems.append(Problem(source.line((key,)), f"`{key}` is not supported yet"))
        elif key in _NO_EFFECT:
            notes.append(_no_effect(key, (key,), source))
        elif value is not None:
            kept[key] = value
    if "parameters" in kept:
        kept["parameters"] = _effective(kept["parameters"], ("parameters",), source, notes)
    if isinstance(kept.get("models"), list):
        kept["models"] = [
            _effective_source(item, ("models", i), source, notes)
            for i, item in enumerate(kept["models"])
        ]
    return kept


def _effective_source(
    item: object, path: source_map.Path, source: SourceMap, notes: list[str]
) -> object:
    if not isinstance(item, dict):
        return item
    kept = {key: value for key, value in item.items() if (key, value) != ("parameters", None)}
    if "parameters" in kept:
        kept["parameters"] = _effective(kept["parameters"], (*path, "parameters"), source, notes)
    return kept


def _effective(
    parameters: object, path: source_map.Path, source: SourceMap, notes: list[str]
) -> object:
    if not isinstance(parameters, dict):
        return parameters
    for key in _NO_EFFECT_PARAMETERS & parameters.keys():
        notes.append(_no_effect(key, (*path, key), source))
    return {key: value for key, value in parameters.items() if key not in _NO_EFFECT_PARAMETERS}


def _no_effect(key: str, path: source_map.Path, source: SourceMap) -> str:
    return place(source.filename, source.line(path), f"`{key}` has no effect on the result")


def _problems(error: ValidationError, source: SourceMap) -> Iterator[Problem]:
    items = error.errors()
    misspelt = [
        (item["loc"][:-1], _unknown_key(str(item["loc"][-1]), "models" in item["loc"]))
        for item in items
        if item["type"] == "extra_forbidden"
    ]
    seen: set[Problem] = set()
    for item in items:
        loc = item["loc"]
        meant = f"did you mean {str(loc[-1])!r}"
        if item["type"] == "missing" and any(
            parent == loc[:-1] and meant in message for parent, message in misspelt
        ):
            continue
        problem = Problem(source.line(loc), _message(item["type"], loc, item))
        if problem not in seen:
            seen.add(problem)
            yield problem


def _message(kind: str, loc: tuple[str | int, ...], item: Mapping[str, Any]) -> str:
    if kind == "extra_forbidden":
        return _unknown_key(str(loc[-1]), "models" in loc)
    # A union's branches (bool, int, ...) are part of pydantic's location but not of the file.
    depth = 4 if loc[0] == "models" else 2
    where = _dotted(loc[:depth])
    if kind == "missing":
        return f"{where} is missing"
    if loc[0] == "options":
        return f"{where}: expected a number, a flag or text, found {_kind(item['input'])}"
    if kind == "value_error":
        return f"{where}: {item['ctx']['error']}"
    if kind == "literal_error":
        hint = nearest(str(item["input"]), ("mergekit", "jaxmerge"))
        return f"{where}: expected {item['ctx']['expected']}, found {item['input']!r}{hint}"
    expected = {
        "string_type": "text",
        "dict_type": "a mapping of names to values",
        "tuple_type": "a list",
        "model_type": "a mapping with the key `model`",
    }
    found = _kind(item["input"])
    return f"{where}: expected {expected.get(kind, item['msg'])}, found {found}"


def _unknown_key(key: str, in_model: bool) -> str:
    valid = [*(Source if in_model else Recipe).model_fields]
    if key in PARAMETERS:
        return f"unknown key {key!r} here; it belongs under `parameters`"
    if not in_model:
        valid += _LATER
    return f"unknown key {key!r}{did_you_mean(key, valid)}"


def _dotted(loc: tuple[str | int, ...]) -> str:
    """Returns `models[0].parameters.weight` for the location of a value."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return f"`{text.removeprefix('.')}`"


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "nothing", str: "text"}
    return names.get(type(value), repr(value))
