"""64 candidates, made and evaluated by one program, beside 64 calls of a jitted one."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clock import in_turn
from report import Table
from workload import inputs, nbytes

import jaxmerge as jm
from jaxmerge.methods import MergeMethod
from sections import Options

RUNS = 5
CANDIDATES = 64
CHUNKS = (1, 2, 4, 8, 16, 64)
METHODS = ("linear", "ties", "slerp", "tsv")
SIZES = (256, 512, 256, 10)
EXAMPLES = 64


def run(options: Options) -> Iterator[Table]:
    base, *tuned = (_network(options.seed + i) for i in range(3))
    tuned = [jax.tree.map(lambda x, d: x + 0.1 * d, base, one) for one in tuned]
    table = Table(
        f"{CANDIDATES} candidates in one program",
        {
            "method": "",
            "64 calls": ".1f",
            **{f"chunks of {chunk}": ".1f" for chunk in CHUNKS},
            "best against calls": ".2f",
            "results": "",
        },
        [
            f"Milliseconds to merge and evaluate {CANDIDATES} networks of {nbytes(base) // 4} parameters on"
            f" {EXAMPLES} examples.",
            "calls: one jitted candidate and evaluation, called in a loop; chunks: jax.lax.map over all,",
            f"so many at once by vmap ({CHUNKS[-1]}: vmap alone).",
        ],
    )
    table.start()
    for name in METHODS:
        if name in options.methods:
            table.add(method=name, **_row(jm.methods.get(name)(), base, tuned, options))
    yield table


def _row(method: MergeMethod, base: Any, tuned: list[Any], options: Options) -> dict[str, Any]:
    given = inputs(method, base, tuned, options.seed)
    state = method.init(given.models, given.base, extras=given.extras)
    examples = jnp.asarray(
        np.random.default_rng(options.seed).standard_normal((EXAMPLES, SIZES[0]), np.float32)
    )
    points = _points(method, len(given.models) + (method.base == "source"), options.seed)
    apart = [jax.tree.map(lambda x, i=i: x[i], points) for i in range(CANDIDATES)]

    def score(state: Any, examples: jax.Array, key: Any, point: Any) -> jax.Array:
        return _evaluate(method.apply(state, point, key), examples)

    def population(chunk: int, state: Any, examples: jax.Array, key: Any, points: Any) -> jax.Array:
        one = functools.partial(score, state, examples, key)
        if chunk == CANDIDATES:
            return jax.vmap(one)(points)
        return jax.lax.map(one, points, batch_size=None if chunk == 1 else chunk)

    single = jax.jit(score)
    arguments = (state, examples, given.key)
    routes: dict[str, Callable[[], Any]] = {
        "64 calls": lambda: [single(*arguments, point) for point in apart]
    }
    for chunk in CHUNKS:
        program = jax.jit(functools.partial(population, chunk))
        routes[f"chunks of {chunk}"] = functools.partial(program, *arguments, points)
    expected = np.asarray(jnp.stack(routes["64 calls"]()))
    equal = all(
        np.allclose(np.asarray(route()), expected, rtol=1e-3, atol=1e-4)
        for name, route in routes.items()
        if name != "64 calls"
    )
    times = in_turn(routes, options.runs or RUNS)
    calls = times["64 calls"].median
    best = min(found.median for name, found in times.items() if name != "64 calls")
    return {
        **{name: found.milliseconds() for name, found in times.items()},
        "best against calls": calls / best,
        "results": "equal" if equal else "DIFFER",
    }


def _points(method: MergeMethod, sources: int, seed: int) -> dict[str, jax.Array]:
    """Hyperparameters of all candidates, at random from their search ranges; flags at their defaults."""
    rng = np.random.default_rng(seed)
    points = {}
    for name, spec in method.hyperparams.items():
        low, high = spec.search or (spec.low, spec.high)
        shape = (CANDIDATES, sources) if spec.scope == "model" else (CANDIDATES,)
        bounded = math.isfinite(low) and math.isfinite(high) and spec.kind != "flag"
        drawn = rng.uniform(low, high, shape) if bounded else np.full(shape, spec.default)
        points[name] = jnp.asarray(drawn, jnp.float32)
    return points


def _network(seed: int) -> dict[str, Any]:
    """A multilayer perceptron, weights [outputs, inputs]."""
    rng = np.random.default_rng(seed)
    return {
        f"layer_{i}": {
            "weight": jnp.asarray(rng.standard_normal((n, m), np.float32) / math.sqrt(m)),
            "bias": jnp.asarray(0.1 * rng.standard_normal(n, np.float32)),
        }
        for i, (m, n) in enumerate(itertools.pairwise(SIZES))
    }


def _evaluate(params: Any, examples: jax.Array) -> jax.Array:
    """How sure the network is of its answers."""
    x = examples
    for i in range(len(SIZES) - 1):
        layer = params[f"layer_{i}"]
        x = jax.nn.relu(x) if i else x
        x = x @ layer["weight"].T + jnp.broadcast_to(layer["bias"], (len(x), len(layer["bias"])))
    return jnp.mean(jnp.max(jax.nn.log_softmax(x), axis=-1))
