"""`jaxmerge methods`."""

from __future__ import annotations

import inspect
import json as json_text
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxmerge.cli.arguments import Imports, Json, import_all
from jaxmerge.cli.consoles import say, show

if TYPE_CHECKING:
    from jaxmerge.methods import Hyperparameter


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One method, with its documentation.")
    ] = None,
    json: Json = False,
    imports: Imports = None,
) -> None:
    """List the merge methods and their hyperparameters.

    Defaults are those of Python and of recipes with `dialect: jaxmerge`.
    """
    from jaxmerge.methods import get, names

    import_all(imports)
    described = [_describe(one) for one in ([name] if name else names())]
    if json:
        typer.echo(json_text.dumps(described[0] if name else described, indent=2))
    elif name:
        say(inspect.getdoc(get(name)) or "")
        _show_one(described[0])
    else:
        _show_all(described)


def _describe(name: str) -> dict[str, Any]:
    from jaxmerge.methods import allowed, get, options

    constructor = get(name)
    method = constructor()
    return {
        "name": name,
        "summary": method.summary,
        "base": method.base,
        "models": list(method.models),
        "random": method.random,
        "extras": {
            extra: {
                "meaning": spec.meaning,
                "kind": spec.kind,
                "per": spec.per,
                "required": spec.required,
            }
            for extra, spec in method.extras.items()
        },
        "per_task": method.per_task,
        "hyperparameters": _hyperparameters(method.hyperparams),
        "options": {
            option: {"default": default, "allowed": list(allowed(constructor, option) or ())}
            for option, default in options(constructor).items()
        },
    }


def _hyperparameters(specs: Any) -> dict[str, Any]:
    from jaxmerge.methods import Hyperparameter

    return {
        name: _spec(spec) if isinstance(spec, Hyperparameter) else _hyperparameters(spec)
        for name, spec in specs.items()
    }


def _spec(spec: Hyperparameter) -> dict[str, Any]:
    return {
        "default": spec.default,
        # JSON has no infinity.
        "low": spec.low if math.isfinite(spec.low) else None,
        "high": spec.high if math.isfinite(spec.high) else None,
        "scope": spec.scope,
        "kind": spec.kind,
        "differentiable": spec.differentiable,
        "search": None if spec.search is None else list(spec.search),
        "meaning": spec.meaning,
    }


def _show_all(described: list[dict[str, Any]]) -> None:
    columns = ("method", "base", "models", "needs", "hyperparameters", "summary")
    rows = [
        (
            one["name"],
            one["base"],
            _count(one["models"]),
            ", ".join(_needs(one)),
            ", ".join(_short(name, spec) for name, spec in one["hyperparameters"].items()),
            one["summary"],
        )
        for one in described
    ]
    show(columns, rows)
    say(
        f"\n{len(described)} methods. * one value for each model. `jaxmerge methods NAME` tells the rest."
        "\nBeside them, in Python: jaxmerge.learning (fit, adamerging, learned_soup, regmean_plus_plus)"
        "\nand jaxmerge.fusion (uniform_soup, greedy_soup, swa, ema, lawa)."
    )


def _show_one(one: dict[str, Any]) -> None:
    from jaxmerge.recipes.dialect import MERGEKIT

    peer = MERGEKIT.get(one["name"])
    say(f"\nBase: {one['base']}; models: {_count(one['models'])}" + _random(one["random"]))
    columns = ["hyperparameter", "default", "bounds", "scope", "kind", "meaning"]
    if peer:
        columns.insert(2, "in mergekit")
    rows = []
    for name, spec in one["hyperparameters"].items():
        row = [name, f"{spec['default']:g}", _bounds(spec), _scope(spec), spec["kind"]]
        if peer:
            row.insert(2, _in_mergekit(name, peer.parameters))
        rows.append([*row, spec["meaning"]])
    say("")
    show(columns, rows)
    if one["extras"]:
        say("")
        rows = [
            [name, extra["per"], "yes" if extra["required"] else "no", extra["meaning"]]
            for name, extra in one["extras"].items()
        ]
        show(("extra", "one per", "required", "meaning"), rows)
    if one["options"]:
        say("")
        rows = [
            [name, option["default"], ", ".join(map(str, option["allowed"]))]
            for name, option in one["options"].items()
        ]
        show(("option", "default", "allowed"), rows)


def _short(name: str, spec: dict[str, Any]) -> str:
    if "default" not in spec:
        return name
    star = "*" if spec["scope"] == "model" else ""
    return f"{name}{star}={spec['default']:g} {_bounds(spec)}"


def _bounds(spec: dict[str, Any]) -> str:
    if spec["kind"] == "flag":
        return "0|1"
    if spec["low"] is None and spec["high"] is None:
        return "any"
    low = "-inf" if spec["low"] is None else f"{spec['low']:g}"
    high = "inf" if spec["high"] is None else f"{spec['high']:g}"
    return f"[{low}, {high}]"


def _scope(spec: dict[str, Any]) -> str:
    return "per model" if spec["scope"] == "model" else "shared"


def _count(models: list[int | None]) -> str:
    low, high = models
    return f"{low}" if low == high else f"{low}+" if high is None else f"{low}-{high}"


def _needs(one: dict[str, Any]) -> list[str]:
    needed = [name for name, extra in one["extras"].items() if extra["required"]]
    return [*(["a seed"] if one["random"] else []), *needed]


def _random(random: bool) -> str:
    return "; random: a seed (in Python a key) decides" if random else ""


def _in_mergekit(name: str, parameters: Any) -> str:
    from jaxmerge.recipes.dialect import mergekit_name

    word = mergekit_name(name)
    if word not in parameters:
        return "none"
    value = parameters[word]
    text = "must be given" if value is None else f"{value:g}"
    return text if word == name else f"{word}: {text}"
