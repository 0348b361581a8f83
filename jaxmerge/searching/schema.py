"""SEARCH.yaml: what it may hold, as pydantic models whose errors name lines and the nearest key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from jaxmerge.recipes import RecipeError, source_map
from jaxmerge.recipes.dialect import library_name
from jaxmerge.recipes.errors import Problem, did_you_mean
from jaxmerge.recipes.reference import ModelReference, parse_reference
from jaxmerge.recipes.source_map import SourceMap
from jaxmerge.search import strategy_names
from jaxmerge.search.variables import Scale

BALANCE = "balance"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Range(_Part):
    """What a hyperparameter may be: `[low, high]`, or `{low, high, scale: log}`."""

    low: float
    high: float
    scale: Scale = "linear"


class Candidate(_Part):
    """A method that blocks may choose: its name, or `{method, options}`."""

    method: str
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)


class Metric(_Part):
    """A score of the model's predictions on examples.

    `data` names .npz files, one for each task: arrays `inputs` and `labels`, or `tokens` for decoders, whose next
    tokens are scored. The models must be of a family that `jaxmerge.converters.load_model` knows.
    """

    metric: Literal["accuracy", "cross_entropy", "perplexity"]
    data: Annotated[tuple[str, ...], BeforeValidator(lambda value: _listed(value))]
    batch_size: Annotated[int, Field(gt=0)] | None = None


def _listed(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and not value:
        raise ValueError("the list is empty")
    return value


def _models(value: object) -> object:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("expected a list of at least one model")
    return tuple(
        parse_reference(one["model"] if isinstance(one, Mapping) and set(one) == {"model"} else one)
        for one in value
    )


def _candidates(value: object) -> object:
    several = value if isinstance(value, list | tuple) else [value]
    if not several:
        raise ValueError("expected at least one method")
    return tuple({"method": one} if isinstance(one, str) else one for one in several)


def _range(value: object) -> object:
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ValueError(f"expected [low, high], found {list(value)}")
        return {"low": value[0], "high": value[1]}
    return value


def _by_library_name(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    return {library_name(str(name)): one for name, one in value.items()}


def _strategy(value: object) -> object:
    def bare(name: str) -> str:
        return name.replace("_", "").replace("-", "").lower()

    names = strategy_names()
    if not isinstance(value, str) or bare(value) not in map(bare, names):
        raise ValueError(f"there is no strategy {value!r}{did_you_mean(str(value), names)}")
    return value


def _blocks(value: object) -> object:
    if isinstance(value, str) or value is None:
        if value not in ("layer", "tensor", None):
            raise ValueError(
                f"expected layer, tensor, or a mapping of names to patterns; found {value!r}"
            )
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError("expected layer, tensor, or a mapping of names to patterns of tensors")
    found = {}
    for label, patterns in value.items():
        several = (patterns,) if isinstance(patterns, str) else patterns
        if not isinstance(several, list | tuple) or not several:
            raise ValueError(f"{label}: expected a pattern of names, or several")
        if not all(isinstance(one, str) and one for one in several):
            raise ValueError(f"{label}: a pattern is text")
        found[str(label)] = tuple(several)
    return found


_Reference = Annotated[ModelReference, BeforeValidator(parse_reference)]


class SearchFile(_Part):
    """A search as written.

    Attributes:
        models, base_model: as in a recipe.
        methods: what each block may be merged by; of several, which one is searched too.
        blocks: parts of the model with a method and values of their own: "layer", "tensor", or label to patterns.
        space: which hyperparameters are searched, and their ranges; empty: all, in the methods' own ranges.
        parameters: numbers that stay as they are.
        objective: "balance", `module:function`, or a metric.
        pareto: each of the objective's scores is an objective of its own.
        strategy, population, restarts, reevaluate, patience: of `jaxmerge.search.evolve`.
        budget: how many candidates are evaluated at most.
        seed: of the search, and of random methods.
        dtype: of the merged tensors.
    """

    models: Annotated[tuple[ModelReference, ...], BeforeValidator(_models)]
    base_model: _Reference | None = None
    methods: Annotated[tuple[Candidate, ...], BeforeValidator(_candidates)]
    blocks: Annotated[
        Literal["layer", "tensor"] | dict[str, tuple[str, ...]] | None, BeforeValidator(_blocks)
    ] = None
    space: Annotated[
        dict[str, Annotated[Range, BeforeValidator(_range)]], BeforeValidator(_by_library_name)
    ] = Field(default_factory=dict)
    parameters: Annotated[dict[str, float | list[float]], BeforeValidator(_by_library_name)] = (
        Field(default_factory=dict)
    )
    objective: Metric | str = BALANCE
    pareto: bool = False
    strategy: Annotated[str, BeforeValidator(_strategy)] | None = None
    population: Annotated[int, Field(gt=0)] = 32
    budget: Annotated[int, Field(gt=0)] = 1024
    restarts: Annotated[int, Field(gt=0)] = 1
    reevaluate: Annotated[int, Field(ge=0)] = 0
    patience: Annotated[int, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: str | None = None

    _folder: Path = PrivateAttr(default_factory=Path.cwd)
    _source: SourceMap = PrivateAttr(default_factory=lambda: SourceMap("<search>", {}))

    @property
    def folder(self) -> Path:
        """The folder of the file, where models and data are looked for second."""
        return self._folder

    @property
    def filename(self) -> str:
        """The file's name in errors."""
        return self._source.filename

    def error(self, message: str, *path: str | int) -> RecipeError:
        """What is wrong at a key, as an error with its line."""
        line = self._source.line(path)
        return RecipeError(message, filename=self._source.filename, line=line)


def read_search(path: str | Path) -> SearchFile:
    """Reads SEARCH.yaml.

    Raises:
        RecipeError: with every problem of the form, each at its line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text ({error.reason})", filename=str(path)) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", filename=str(path)) from None
    search = parse_search(text, filename=str(path))
    search._folder = path.absolute().parent
    return search


def parse_search(text: str, *, filename: str = "<search>") -> SearchFile:
    """Parses the text of a SEARCH.yaml.

    Raises:
        RecipeError: as for `read_search`.

    >>> parse_search("models: [a, b]\\nmethods: ties\\nbudgt: 10", filename="s.yaml")
    Traceback (most recent call last):
    ...
    jaxmerge.recipes.errors.RecipeError: s.yaml:3: unknown key 'budgt'; did you mean 'budget'? ...
    """
    data, source = source_map.load(text, filename=filename)
    if not isinstance(data, dict):
        raise RecipeError("a search is a mapping of keys to values", filename=filename)
    if "merge_method" in data and "methods" not in data:
        # The recipe's word, for one method.
        data["methods"] = data.pop("merge_method")
        source.lines[("methods",)] = source.line(("merge_method",)) or 1
    try:
        search = SearchFile.model_validate(data)
    except ValidationError as error:
        raise RecipeError(list(_problems(error, source)), filename=filename) from None
    search._source = source
    return search


def _problems(error: ValidationError, source: SourceMap) -> Iterator[Problem]:
    seen = set()
    for item in error.errors():
        # The branches of a union are part of pydantic's location but not of the file.
        loc = item["loc"]
        while loc and loc not in source.lines and loc[:-1] not in source.lines:
            loc = loc[:-1]
        problem = Problem(source.line(loc), _message(loc, item))
        if problem not in seen:
            seen.add(problem)
            yield problem


def _message(loc: tuple[str | int, ...], item: ErrorDetails) -> str:
    where = ".".join(map(str, loc))
    if item["type"] == "extra_forbidden":
        part = _part_at(loc[:-1])
        return f"unknown key {str(loc[-1])!r}{did_you_mean(str(loc[-1]), part.model_fields)}"
    if item["type"] == "missing":
        return f"`{item['loc'][-1]}` is missing" + (f" in `{where}`" if len(loc) > 1 else "")
    if item["type"] == "value_error":
        return f"`{where}`: {item['ctx']['error']}"
    return f"`{where}`: {item['msg'][:1].lower()}{item['msg'][1:]}, found {item['input']!r}"


def _part_at(loc: tuple[str | int, ...]) -> type[BaseModel]:
    parts: dict[str | int, type[BaseModel]] = {
        "space": Range,
        "methods": Candidate,
        "objective": Metric,
    }
    return parts.get(loc[0], SearchFile) if loc else SearchFile
