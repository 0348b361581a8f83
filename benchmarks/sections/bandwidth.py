"""How near every method comes to the memory's bandwidth, beside a copy and a weighted sum in the same run."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clock import in_turn
from report import Table
from workload import (
    SMALLER,
    Inputs,
    defaults,
    inputs,
    kind,
    merging,
    models_for,
    nbytes,
    weighted_sum,
)

import jaxmerge as jm
from jaxmerge.methods import MergeMethod
from sections import Options

RUNS = 7
SUM_LIMIT = 1.5
ELEMENTWISE_LIMIT = 2.0
ACCELERATOR_LIMITS = {"elementwise": 0.6, "trimmed": 0.15}


def run(options: Options) -> Iterator[Table]:
    yield _peers(options)
    yield _methods(options)


def copy() -> Callable[[Any], Any]:
    """A copy of a tree, as a program of its own."""
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def _peers(options: Options) -> Table:
    base, *tuned = models_for("elementwise", options.elements, options.seed)
    size = nbytes(base)
    table = Table(
        "Rulers",
        {"route": "", "GB/s": ".1f", "limit": ".2f", "holds": ""},
        [
            f"Trees of {size / 2**20:.0f} MiB in {len(jax.tree.leaves(base))} float32 leaves; bytes read and written.",
            f"Limit: the weighted sum at 1/{SUM_LIMIT} of the copy's throughput or more.",
        ],
    )
    table.start()
    routes: dict[str, Callable[[], Any]] = {
        "copy, jitted": functools.partial(copy(), base),
        "weighted sum of two, jitted": functools.partial(weighted_sum(2), tuned),
    }
    if jax.default_backend() == "cpu":
        source = [np.asarray(leaf) for leaf in jax.tree.leaves(base)]
        place = [np.ones_like(leaf) for leaf in source]

        def into() -> None:
            for target, leaf in zip(place, source, strict=True):
                np.copyto(target, leaf)

        routes["np.copyto, one thread, into memory at hand"] = into
    times = in_turn(routes, options.runs or RUNS)
    copied = times["copy, jitted"].rate(2 * size)
    for name, found in times.items():
        rate = found.rate((3 if "sum" in name else 2) * size)
        if "sum" in name:
            limit = copied["median"] / SUM_LIMIT
            holds = "yes" if rate["median"] >= limit else f"no: {limit / rate['median']:.2f}x below"
            table.add(route=name, **{"GB/s": rate, "limit": limit, "holds": holds})
        else:
            table.add(route=name, **{"GB/s": rate})
    return table


def _methods(options: Options) -> Table:
    accelerator = jax.default_backend() != "cpu"
    limits = (
        f"Limits on this device, of the copy's throughput: {ACCELERATOR_LIMITS}, for all three forms."
        if accelerator
        else f"Limit for elementwise methods, all three forms: 1/{ELEMENTWISE_LIMIT:.0f} of the sum's throughput."
    )
    table = Table(
        "Throughput of every method",
        {
            "method": "",
            "kind": "",
            "MiB": ".0f",
            "candidate": ".2f",
            "merge": ".2f",
            "in jit": ".2f",
            "sum": ".2f",
            "copy": ".2f",
            "candidate/sum": ".2f",
            "merge/sum": ".2f",
            "in jit/sum": ".2f",
            "holds": "",
        },
        [
            "GB/s: the bytes of all inputs and of the output, over the time. candidate: a jitted apply, after init;",
            "merge: eager jm.merge, compiled before; in jit: jm.merge inside a jit, which joins equal shapes first.",
            "sum and copy: a jitted weighted sum of two trees and a copy, in turn with the method.",
            limits,
            f"Models are smaller, about so many times, for the kinds {SMALLER}.",
        ],
    )
    table.start()
    for name in options.methods:
        method = jm.methods.get(name)()
        assert method.leaf is not None
        sort = kind(method.leaf)
        base, *tuned = models_for(sort, options.elements, options.seed)
        given = inputs(method, base, tuned, options.seed)
        try:
            row = _row(method, sort, given, tuned, options.runs or RUNS, accelerator)
        except Exception as error:
            row = {"holds": f"no: {type(error).__name__}: {str(error)[:80]}"}
        table.add(method=name, kind=sort, **row)
    return table


def _row(
    method: MergeMethod,
    sort: str,
    given: Inputs,
    tuned: list[Any],
    runs: int,
    accelerator: bool,
) -> dict[str, Any]:
    state = method.init(given.models, given.base, extras=given.extras)
    point = defaults(method, len(given.models) + (method.base == "source"))
    candidate = jax.jit(method.apply)
    routes: dict[str, Callable[[], Any]] = {
        "sum": functools.partial(weighted_sum(2), tuned[:2]),
        "copy": functools.partial(copy(), tuned[0]),
        "candidate": lambda: candidate(state, point, given.key),
    }
    limited = sort in ACCELERATOR_LIMITS if accelerator else sort == "elementwise"
    if limited:
        routes["merge"] = lambda: jm.merge(method, given.models, **merging(method, given))

        @jax.jit
        def whole(models: Any, arguments: Any) -> Any:
            return jm.merge(method, models, **arguments)

        routes["in jit"] = lambda: whole(given.models, merging(method, given))
    written = nbytes(jax.eval_shape(method.apply, state, point, given.key))
    size = given.size + written
    times = in_turn(routes, runs)
    one = nbytes(tuned[0])
    rates = {name: found.rate(_bytes(name, one, size)) for name, found in times.items()}
    row: dict[str, Any] = {"MiB": size / 2**20, **rates}
    forms = [name for name in ("candidate", "merge", "in jit") if name in rates]
    for name in forms:
        row[f"{name}/sum"] = rates[name]["median"] / rates["sum"]["median"]
    if limited:
        row["holds"] = _verdict(sort, rates, forms, accelerator)
    return row


def _bytes(route: str, one: int, size: int) -> int:
    return {"sum": 3 * one, "copy": 2 * one}.get(route, size)


def _verdict(sort: str, rates: dict[str, Any], forms: list[str], accelerator: bool) -> str:
    if accelerator:
        least = ACCELERATOR_LIMITS[sort] * rates["copy"]["median"]
    else:
        least = rates["sum"]["median"] / ELEMENTWISE_LIMIT
    below = [name for name in forms if rates[name]["median"] < least]
    return f"no: {', '.join(below)}" if below else "yes"
