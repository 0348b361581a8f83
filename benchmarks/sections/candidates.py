"""What `init` costs once and what one more candidate costs, beside what it cannot do without."""

import functools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from clock import in_turn
from jax.extend import core
from report import Table
from workload import SMALLER, defaults, inputs, kind, models_for, weighted_sum

import jaxmerge as jm
from sections import Options

RUNS = 5
LIMIT = 2.0
KINDS = ("trimmed", "spectral", "solving")

HEAVY = ("sort", "top_k", "svd", "eigh", "eig", "qr", "geqrf", "cholesky", "lu")
"""Primitives that order or take apart: a candidate should need none."""


class Product(NamedTuple):
    """A matrix product in a program: shapes and dtypes of both sides, and how it is made."""

    left: Any
    right: Any
    dimensions: Any
    precision: Any
    dtype: Any


def run(options: Options) -> Iterator[Table]:
    table = Table(
        "One more candidate",
        {
            "method": "",
            "kind": "",
            "init s": ".2f",
            "apply ms": ".1f",
            "ruler ms": ".1f",
            "ruler": "",
            "apply/ruler": ".2f",
            "limit": ".1f",
            "apply also runs": "",
            "holds": "",
        },
        [
            "init: eager, the second call; apply: jitted, with traced hyperparameters. Rulers, in turn with apply:",
            "sum: a jitted weighted sum of all the trees that go in; products: the matrix products of apply's own",
            "program, alone, or the sum where there are none. apply also runs: orderings and factorisations in apply.",
            f"Trees of about {options.elements * 4 / 2**20:.0f} MiB; smaller, so many times, for {SMALLER}.",
        ],
    )
    table.start()
    for name in options.methods:
        method = jm.methods.get(name)()
        assert method.leaf is not None
        sort = kind(method.leaf)
        if sort not in KINDS:
            continue
        try:
            row = _row(method, sort, options)
        except Exception as error:
            row = {"holds": f"no: {type(error).__name__}: {str(error)[:80]}"}
        table.add(method=name, kind=sort, **row)
    yield table


def _row(method: Any, sort: str, options: Options) -> dict[str, Any]:
    base, *tuned = models_for(sort, options.elements, options.seed)
    given = inputs(method, base, tuned, options.seed)

    def prepare() -> Any:
        return jax.block_until_ready(method.init(given.models, given.base, extras=given.extras))

    state = prepare()
    started = time.perf_counter()
    prepare()
    init = time.perf_counter() - started
    point = defaults(method, len(given.models) + (method.base == "source"))
    program = jax.make_jaxpr(method.apply)(state, point, given.key).jaxpr
    found = _products(program) if sort == "spectral" else Counter()
    candidate = jax.jit(method.apply)
    routes = {
        "apply": lambda: candidate(state, point, given.key),
        "sum": functools.partial(weighted_sum(len(given.trees)), given.trees),
    }
    if found:
        routes["products"] = _alone(found)
    times = in_turn(routes, options.runs or RUNS)
    ruler = "products" if found else "sum"
    ratio = times["apply"].median / times[ruler].median
    row: dict[str, Any] = {
        "init s": float(f"{init:.4g}"),
        "apply ms": times["apply"].milliseconds(),
        "ruler ms": times[ruler].milliseconds(),
        "ruler": ruler,
        "apply/ruler": ratio,
        "apply also runs": _listed(Counter(_heavy(program))),
    }
    if sort != "solving":
        row["limit"] = LIMIT
        row["holds"] = "yes" if ratio <= LIMIT else f"no: {ratio:.1f}x"
    return row


def _alone(products: Counter[Product]) -> Any:
    """A jitted program of just these products, on random matrices; those in loops as often as they run."""
    rng = np.random.default_rng(0)

    def draw(shaped: Any) -> jax.Array:
        return jax.numpy.asarray(rng.standard_normal(shaped.shape), shaped.dtype)

    listed = list(products.items())
    sides = [(draw(product.left), draw(product.right)) for product, _ in listed]

    @jax.jit
    def multiply(sides: Any) -> Any:
        results = []
        for (product, count), (left, right) in zip(listed, sides, strict=True):
            for i in range(count):
                # Products that differ in nothing would be made once.
                results.append(
                    jax.lax.dot_general(
                        left * (1.0 + i) if i else left,
                        right,
                        product.dimensions,
                        precision=product.precision,
                        preferred_element_type=product.dtype,
                    )
                )
        return results

    return lambda: multiply(sides)


def _products(program: core.Jaxpr, times: int = 1) -> Counter[Product]:
    found: Counter[Product] = Counter()
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (
                jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars
            )
            params = equation.params
            found[
                Product(
                    left,
                    right,
                    params["dimension_numbers"],
                    params["precision"],
                    params["preferred_element_type"],
                )
            ] += times
        inner = times * equation.params.get("length", 1) if "length" in equation.params else times
        for part in _inside(equation):
            found += _products(part, inner)
    return found


def _heavy(program: core.Jaxpr) -> Iterator[str]:
    for equation in program.eqns:
        if equation.primitive.name in HEAVY:
            yield equation.primitive.name
        for part in _inside(equation):
            yield from _heavy(part)


def _inside(equation: Any) -> Iterator[core.Jaxpr]:
    for value in jax.tree.leaves(
        list(equation.params.values()),
        is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
    ):
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def _listed(names: Counter[str]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in sorted(names.items()))
