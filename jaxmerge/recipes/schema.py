"""The recipe: what a merge file may hold, as pydantic models that remember their lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from jaxmerge.recipes import source_map
from jaxmerge.recipes.dialect import PARAMETERS
from jaxmerge.recipes.errors import Problem, RecipeError, did_you_mean, place
from jaxmerge.recipes.reference import ModelReference, nearest_name, parse_reference
from jaxmerge.recipes.settings import Setting, plain_setting, read_setting
from jaxmerge.recipes.source_map import SourceMap
from jaxmerge.tree import nearest

DTYPES = ("float32", "float16", "bfloat16", "float64")
CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")

# Keys that recipes carry though they cannot change the merged tensors: switches of the peer's
# command, and the precision of a temporary mask.
_NO_EFFECT = frozenset(
    (
        *("int8_mask", "allow_crimes", "async_write", "clone_tensors", "copy_tokenizer", "cuda"),
        *("device", "gpu_rich", "lazy_unpickle", "lora_merge_cache", "low_cpu_memory"),
        *("lora_merge_dtype", "multi_gpu", "num_threads", "out_shard_size", "quiet"),
        *("random_seed", "read_to_gpu", "safe_serialization", "transformers_cache"),
        *("trust_remote_code", "verbosity", "write_model_card", "write_threads"),
    )
)
_NO_EFFECT_PARAMETERS = frozenset({"int8_mask", "embed_slerp"})


def _dtype(value: object) -> str:
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"unknown dtype {value!r}{did_you_mean(str(name), DTYPES)}")
    return name


def _some(value: object) -> object:
    if isinstance(value, list | tuple) and not value:
        raise ValueError("the list is empty; a merge needs at least one model")
    return value


def _patterns(value: object) -> object:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not patterns:
        raise ValueError(f"expected a pattern of names, or several; found {_kind(value)}")
    for one in patterns:
        if not isinstance(one, str) or not one:
            raise ValueError(f"a pattern is text; found {one!r}")
    return tuple(patterns)


def _name(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or set(value) & set("/\\") or value == "..":
        raise ValueError(f"a merge's name is that of a folder, without slashes; found {value!r}")
    return value


def _layer_range(value: object) -> tuple[int, int]:
    wanted = "expected [first, end], two whole numbers, the end not counted"
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{wanted}; found {value!r}")
    first, end = (int(v) if isinstance(v, str) and v.strip().isdigit() else v for v in value)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in (first, end)):
        raise ValueError(f"{wanted}; found {value!r}")
    if first < 0 or end < first:
        raise ValueError(f"0 <= first <= end must hold; found [{first}, {end}]")
    return first, end


def _tokenizer_source(value: object) -> str | ModelReference:
    if isinstance(value, str) and value in ("union", "base"):
        return value
    return parse_reference(value)


def _chat_template(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a name or a Jinja template, found {_kind(value)}")
    if "{" not in value and value != "auto" and value not in CHAT_TEMPLATES:
        raise ValueError(
            f"{value!r} is no Jinja template{did_you_mean(value, ('auto', *CHAT_TEMPLATES))}"
        )
    return value


def _share(value: object) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= float(value) <= 1:  # type: ignore[arg-type]
        raise ValueError(f"expected the weights' share, a number from 0 to 1; found {value!r}")
    return float(value)  # type: ignore[arg-type]


def _plain_mapping(value: object) -> object:
    """What config.json could hold."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected values as in a config.json: {error}") from None
    return value


def _token_source(value: object) -> object:
    """A model's name alone takes the token from there."""
    if value is None or (isinstance(value, Mapping) and "kind" in value):
        return value
    return {"kind": "model", "model": value}


_Reference = Annotated[ModelReference, BeforeValidator(parse_reference)]
_Parameters = dict[str, Annotated[Setting, BeforeValidator(read_setting)]]
_Dtype = Annotated[str, BeforeValidator(_dtype)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Source(_Part):
    """One model of a recipe, with what is set for it alone."""

    model: _Reference
    parameters: _Parameters = Field(default_factory=dict)


class SliceSource(_Part):
    """Successive layers of one model: those from the first to before the end of the range."""

    model: _Reference
    layer_range: Annotated[tuple[int, int], BeforeValidator(_layer_range)]
    parameters: _Parameters = Field(default_factory=dict)


class OutputSlice(_Part):
    """Successive layers of the output, merged from as many of each source."""

    sources: Annotated[tuple[SliceSource, ...], BeforeValidator(_some)]
    base_model: _Reference | None = None
    parameters: _Parameters = Field(default_factory=dict)


class Module(_Part):
    """A part of the model with layers of its own, such as an encoder."""

    models: Annotated[tuple[Source, ...], BeforeValidator(_some)] = ()
    slices: Annotated[tuple[OutputSlice, ...], BeforeValidator(_some)] = ()
    parameters: _Parameters = Field(default_factory=dict)


class TokenSource(_Part):
    """Where a token's embedding comes from: zeros, the same token of a model, or another one."""

    kind: Literal["zero", "model", "model_token"]
    model: _Reference | None = None
    token: str | None = None
    token_id: int | None = None


class Token(_Part):
    """What is set for one token: where its embedding comes from, also where a model has one."""

    source: Annotated[TokenSource | None, BeforeValidator(_token_source)] = None
    force: bool = False


class Tokenizer(_Part):
    """The output's tokenizer: of all models together, of the base, or of one model."""

    source: Annotated[str | ModelReference, BeforeValidator(_tokenizer_source)] = "union"
    tokens: dict[str, Token] = Field(default_factory=dict)
    pad_to_multiple_of: Annotated[int, Field(gt=0)] | None = None


class Block(_Part):
    """Tensors of the output that are merged by a method of their own.

    Patterns match whole names, as in `jaxmerge.tree.matches`; a tensor belongs to the first block that matches it.
    """

    tensors: Annotated[tuple[str, ...], BeforeValidator(_patterns)]
    merge_method: str
    parameters: _Parameters = Field(default_factory=dict)
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)


class Align(_Part):
    """How models are brought into the order of one of them before they are merged.

    Attributes:
        to: the model that stays as it is; None: the base, or else the first model.
        method: what units are compared by; None: "dual" where there are data, else "weight".
        alpha: the share of the weights, for "dual"; None: a half.
        data: a file of inputs, .npz or .npy.
        family: of the models, where the checkpoints do not tell.
        config: in place of their config.json.
        restarts: how many matchings are made, of which the best counts.
        seed: of the matchings.
        heads: "split" as the official code of MuDSC does it, for comparison.
    """

    to: _Reference | None = None
    method: Literal["weight", "activation", "dual"] | None = None
    alpha: Annotated[float, BeforeValidator(_share)] | None = None
    data: str | None = None
    family: str | None = None
    config: Annotated[dict[str, Any], BeforeValidator(_plain_mapping)] | None = None
    restarts: Annotated[int, Field(gt=0)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    heads: Literal["joint", "split"] = "joint"


class Recipe(_Part):
    """A merge as written, before names are looked up.

    Exactly one of `models`, `slices` and `modules` is not empty. Where there are `blocks`, the method, parameters and
    options beside them are those of the tensors that no block names. Numbers are finite floats (a flag
    is 0.0 or 1.0); lists are tuples. `tokenizer_source: X` is read as `tokenizer: {source: X}`.
    `jaxmerge.recipes.resolve` says what they mean.
    """

    name: Annotated[str, BeforeValidator(_name)] | None = None
    dialect: Literal["mergekit", "jaxmerge"] = "mergekit"
    merge_method: str
    base_model: _Reference | None = None
    models: Annotated[tuple[Source, ...], BeforeValidator(_some)] = ()
    slices: Annotated[tuple[OutputSlice, ...], BeforeValidator(_some)] = ()
    modules: Annotated[dict[str, Module], BeforeValidator(_some)] = Field(default_factory=dict)
    parameters: _Parameters = Field(default_factory=dict)
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    tensors: Literal["same", "union", "intersection"] = "same"
    dtype: _Dtype | None = None
    out_dtype: _Dtype | None = None
    align: Align | None = None
    tokenizer: Tokenizer | None = None
    chat_template: Annotated[str, BeforeValidator(_chat_template)] | None = None

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
    recipe, problems = _parsed(*source_map.load(text, filename=filename))
    if problems:
        raise RecipeError(problems, filename=filename)
    assert recipe is not None
    return recipe


def parse_all(text: str, *, filename: str = "<recipe>") -> tuple[Recipe, ...]:
    """Parses every document of a text, merges that may use each other by their `name`.

    Args:
        text: YAML documents, with `---` between them.
        filename: the name to show in errors.

    Raises:
        RecipeError: with every problem of the form, each at its line.

    >>> text = "name: x\\nmerge_method: linear\\nmodels: [{model: a}]\\n---\\n" \\
    ...        "merge_method: linear\\nmodels: [{model: x}]\\n"
    >>> [recipe.name for recipe in parse_all(text)]
    ['x', None]
    """
    parsed = [_parsed(*document) for document in source_map.load_all(text, filename=filename)]
    problems = [problem for _, found in parsed for problem in found]
    if problems:
        raise RecipeError(problems, filename=filename)
    return tuple(recipe for recipe, _ in parsed if recipe is not None)


def read(path: str | Path) -> Recipe:
    """Reads a recipe's file.

    Raises:
        RecipeError: as `parse`, and where the file cannot be read.
    """
    path = Path(path)
    return _beside(parse(_text(path), filename=str(path)), path)


def read_all(path: str | Path) -> tuple[Recipe, ...]:
    """Reads every recipe of a file.

    Raises:
        RecipeError: as `parse_all`, and where the file cannot be read.
    """
    path = Path(path)
    return tuple(_beside(one, path) for one in parse_all(_text(path), filename=str(path)))


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
    return yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True)


def _plain(part: BaseModel) -> dict[str, Any]:
    """What is set in a part, as YAML holds it; defaults are left out."""
    data: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if value == field.get_default(call_default_factory=True) and not field.is_required():
            continue
        if name == "parameters":
            data[name] = {key: plain_setting(setting) for key, setting in value.items()}
        else:
            data[name] = _plain_value(value)
    return data


def _plain_value(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _plain(value)
    if isinstance(value, ModelReference):
        return str(value)
    if isinstance(value, tuple):
        return [_plain_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain_value(item) for key, item in value.items()}
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest_name(path)
        hint = f"; did you mean {near!r}?" if near else ""
        raise RecipeError(f"no such file{hint}", filename=str(path)) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text ({error.reason})", filename=str(path)) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", filename=str(path)) from None


def _beside(recipe: Recipe, path: Path) -> Recipe:
    recipe._folder = path.absolute().parent
    return recipe


def _parsed(data: object, source: SourceMap) -> tuple[Recipe | None, list[Problem]]:
    if not isinstance(data, dict):
        return None, [Problem(source.line(()), f"a recipe is a mapping, found {_kind(data)}")]
    problems: list[Problem] = []
    notes: list[str] = []
    kept = _effective(data, (), source, notes)
    _put_together_tokenizer(kept, source, problems)
    try:
        recipe = Recipe.model_validate(kept)
    except ValidationError as error:
        return None, [*problems, *_problems(error, source), *_structure_problems(kept, source)]
    problems += _structure_problems(kept, source)
    recipe._source = source
    recipe._notes = tuple(notes)
    return recipe, problems


def _effective(data: Any, path: source_map.Path, source: SourceMap, notes: list[str]) -> Any:
    """Takes out what is empty or without effect, and says so."""
    if isinstance(data, list):
        return [_effective(item, (*path, i), source, notes) for i, item in enumerate(data)]
    if not isinstance(data, dict):
        return data
    idle = _idle_keys(path)
    kept: dict[str, Any] = {}
    for key, value in data.items():
        where = (*path, key)
        if key in idle:
            notes.append(
                place(source.filename, source.line(where), f"`{key}` has no effect on the result")
            )
        elif path[-1:] == ("parameters",) or key == "options" or where == ("align", "config"):
            kept[key] = value
        elif value is not None or key in ("model", "layer_range"):
            kept[key] = _effective(value, where, source, notes)
        elif where == ("align",):
            # The key alone asks for an alignment as it is without settings.
            kept[key] = {}
    return kept


def _idle_keys(path: source_map.Path) -> frozenset[str]:
    if not path:
        return _NO_EFFECT
    if path[-1] == "parameters":
        return _NO_EFFECT_PARAMETERS
    if path[-1] in ("model", "base_model"):
        return frozenset({"override_architecture"})
    return frozenset({"residual_weight"}) if path[-2:-1] == ("slices",) else frozenset()


def _put_together_tokenizer(
    kept: dict[str, Any], source: SourceMap, problems: list[Problem]
) -> None:
    """`tokenizer_source: X` is short for `tokenizer: {source: X}`."""
    if "tokenizer_source" not in kept:
        return
    chosen = kept.pop("tokenizer_source")
    line = source.line(("tokenizer_source",))
    if "tokenizer" in kept:
        problems.append(Problem(line, "give `tokenizer_source` or `tokenizer`, not both"))
        return
    kept["tokenizer"] = {"source": chosen}
    source.lines[("tokenizer",)] = source.lines[("tokenizer", "source")] = line or 1


def _structure_problems(kept: dict[str, Any], source: SourceMap) -> Iterator[Problem]:
    """What no single key tells: that one of several keys is needed, and no more."""
    given = [key for key in _BODIES if key in kept]
    if not given and not any(nearest(str(key), _BODIES) for key in kept.keys() - _KNOWN):
        yield Problem(source.line(()), "`models` is missing (or `slices`, or `modules`)")
    for key in given[1:]:
        yield Problem(
            source.line((key,)),
            f"exactly one of {', '.join(f'`{body}`' for body in _BODIES)} is given; "
            f"found `{given[0]}` and `{key}`",
        )
    if kept.get("blocks"):
        if kept.get("dialect") != "jaxmerge":
            yield Problem(source.line(("blocks",)), "`blocks` needs `dialect: jaxmerge`")
        for body in ("slices", "modules"):
            if body in kept:
                yield Problem(
                    source.line(("blocks",)), f"`blocks` goes with `models`, not with `{body}`"
                )
    if "align" in kept and given and "models" not in given:
        yield Problem(
            source.line(("align",)),
            f"`align` needs `models`: units of whole models are matched, found `{given[0]}`",
        )
    modules = kept.get("modules")
    for name, module in modules.items() if isinstance(modules, dict) else ():
        if isinstance(module, dict) and ("models" in module) == ("slices" in module):
            text = f"`modules.{name}` needs either `models` or `slices`"
            yield Problem(source.line(("modules", name)), text)
    tokenizer = kept.get("tokenizer")
    tokens = tokenizer.get("tokens") if isinstance(tokenizer, dict) else None
    for token, settings in tokens.items() if isinstance(tokens, dict) else ():
        chosen = settings.get("source") if isinstance(settings, dict) else None
        if isinstance(chosen, dict) and "kind" in chosen:
            yield from _token_problems(chosen, ("tokenizer", "tokens", token, "source"), source)


def _token_problems(
    chosen: dict[str, Any], path: source_map.Path, source: SourceMap
) -> Iterator[Problem]:
    given = {key for key in ("model", "token", "token_id") if key in chosen}
    wanted = {"zero": "nothing else", "model": "`model`"}.get(
        str(chosen["kind"]), "`model` and one of `token` and `token_id`"
    )
    fits = {
        "zero": not given,
        "model": given == {"model"},
        "model_token": "model" in given and len(given) == 2,
    }
    if not fits.get(str(chosen["kind"]), True):
        yield Problem(
            source.line(path), f"{_dotted(path)}: `kind: {chosen['kind']}` takes {wanted}"
        )


def _problems(error: ValidationError, source: SourceMap) -> Iterator[Problem]:
    items = [(_place(item["loc"], source), item) for item in error.errors()]
    misspelt = [
        (loc[:-1], _unknown_key(loc)) for loc, item in items if item["type"] == "extra_forbidden"
    ]
    seen: set[Problem] = set()
    for loc, item in items:
        meant = f"did you mean {str(loc[-1])!r}"
        if item["type"] == "missing" and any(
            parent == loc[:-1] and meant in message for parent, message in misspelt
        ):
            continue
        problem = Problem(source.line(loc), _message(loc, item))
        if problem not in seen:
            seen.add(problem)
            yield problem


def _place(loc: tuple[str | int, ...], source: SourceMap) -> source_map.Path:
    """The part of pydantic's location that stands in the file, and a key that is missing there."""
    depth = len(loc)
    # A union's branches (bool, int, ...) are part of pydantic's location but not of the file.
    while depth and loc[:depth] not in source.lines and loc[: depth - 1] not in source.lines:
        depth -= 1
    if depth and loc[:depth] not in source.lines and loc[depth - 1] in _BRANCHES:
        depth -= 1
    return loc[:depth]


def _message(loc: source_map.Path, item: Mapping[str, Any]) -> str:
    kind = item["type"]
    if kind == "extra_forbidden":
        return _unknown_key(loc)
    where = _dotted(loc)
    if kind == "missing":
        return f"{where} is missing"
    if "options" in loc[:-1]:
        return f"{where}: expected a number, a flag or text, found {_kind(item['input'])}"
    if kind == "value_error":
        return f"{where}: {item['ctx']['error']}"
    if kind == "literal_error":
        valid = _LITERALS.get(str(loc[-1]), ())
        hint = nearest(str(item["input"]), valid)
        return f"{where}: expected {item['ctx']['expected']}, found {item['input']!r}{hint}"
    expected = {
        "string_type": "text",
        "dict_type": "a mapping of names to values",
        "tuple_type": "a list",
        "model_type": f"a mapping with {_keys_of(loc)}",
        "int_type": "a whole number",
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "greater_than": "a number above 0",
        "greater_than_equal": "a number from 0",
        "less_than": "a number below 2^32",
        "bool_type": "true or false",
        "bool_parsing": "true or false",
    }
    found = _kind(item["input"])
    return f"{where}: expected {expected.get(kind, item['msg'])}, found {found}"


_BODIES = ("models", "slices", "modules")
_KNOWN = frozenset({*Recipe.model_fields, "tokenizer_source"})
_BRANCHES = frozenset({"bool", "int", "float", "str", "constrained-int"})
_LITERALS: Mapping[str, tuple[str, ...]] = {
    "dialect": ("mergekit", "jaxmerge"),
    "tensors": ("same", "union", "intersection"),
    "kind": ("zero", "model", "model_token"),
    "method": ("weight", "activation", "dual"),
    "heads": ("joint", "split"),
}


def _part_at(loc: source_map.Path) -> type[BaseModel]:
    """The kind of mapping that stands at a place."""
    parts: Mapping[str, type[BaseModel]] = {
        "models": Source,
        "slices": OutputSlice,
        "blocks": Block,
        "sources": SliceSource,
        "modules": Module,
        "tokens": Token,
    }
    for i in range(len(loc) - 1, -1, -1):
        if loc[i] == "tokenizer":
            return Tokenizer
        if loc[i] == "align":
            return Align
        if loc[i] in parts and i == len(loc) - 2:
            return parts[str(loc[i])]
        if loc[i] == "source" and i == len(loc) - 1 and "tokens" in loc:
            return TokenSource
    return Recipe


def _keys_of(loc: source_map.Path) -> str:
    part = _part_at(loc)
    needed = [key for key, field in part.model_fields.items() if field.is_required()]
    keys = needed or list(part.model_fields)
    return f"the key{'s' * (len(keys) > 1)} " + ", ".join(f"`{key}`" for key in keys)


def _unknown_key(loc: source_map.Path) -> str:
    key = str(loc[-1])
    part = _part_at(loc[:-1])
    if key == "align":
        return (
            "`align` stands at the top of a recipe: it brings whole models into one order, "
            f"not {_dotted(loc[:-1])}"
        )
    if key in PARAMETERS and "parameters" in part.model_fields:
        return f"unknown key {key!r} here; it belongs under `parameters`"
    valid = _KNOWN if part is Recipe else part.model_fields
    return f"unknown key {key!r}{did_you_mean(key, valid)}"


def _dotted(loc: source_map.Path) -> str:
    """Returns `models[0].parameters.weight` for the location of a value."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return f"`{text.removeprefix('.')}`"


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "nothing", str: "text"}
    return names.get(type(value), repr(value))
