"""Linear assignment: the solvers beside SciPy on the same machine's processor."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clock import in_turn
from report import Table
from scipy.optimize import linear_sum_assignment

import jaxmerge as jm
from alignment_sections import Options, verdict

BATCHES = {512: 16, 2048: 8}
HUNGARIAN_LIMIT = 512
"""Larger problems, batches and rows with ties take optax's solver minutes."""


def run(options: Options) -> Iterator[Table]:
    accelerator = jax.default_backend() != "cpu"
    table = Table(
        "Assignment",
        {
            "problem": "",
            "SciPy": ".4g",
            "scipy": ".4g",
            "paths": ".4g",
            "hungarian": ".4g",
            "paths against SciPy": ".2f",
            "sums": "",
            "holds": "",
        },
        [
            "Milliseconds. SciPy: a loop over the matrices on the processor; the others: solvers of",
            "`jaxmerge.align.assign` in a jitted program, the matrices where it runs. paths against SciPy:",
            "how many times faster. sums: whether all solvers reach SciPy's sum of similarities. Limit, on an",
            "accelerator: paths is as fast as SciPy on 16 x 512 and 8 x 2048.",
        ],
    )
    table.start()
    rng = np.random.default_rng(options.seed)
    for n in options.sizes:
        for kind, draw in KINDS.items():
            matrices = draw(rng, n)[None]
            table.add(problem=f"{n}, {kind}", **_row(matrices, kind, options, False))
    for n, count in BATCHES.items():
        if n <= max(options.sizes):
            for kind, draw in KINDS.items():
                matrices = np.stack([draw(rng, n) for _ in range(count)])
                label = f"{count} x {n}, {kind}"
                table.add(problem=label, **_row(matrices, kind, options, accelerator))
    yield table


def _row(matrices: np.ndarray, kind: str, options: Options, judged: bool) -> dict[str, Any]:
    count, n = matrices.shape[:2]
    solvers = ["scipy", "paths"]
    if n <= HUNGARIAN_LIMIT and count == 1 and kind in ("correlations", "random"):
        solvers.append("hungarian")
    placed = jax.block_until_ready(jnp.asarray(matrices))
    routes: dict[str, Callable[[], Any]] = {
        "SciPy": lambda: [linear_sum_assignment(one, maximize=True)[1] for one in matrices]
    }
    for solver in solvers:
        routes[solver] = _solve(solver, placed)
    sums = {name: _sum(matrices, np.stack(route())) for name, route in routes.items()}
    times = in_turn(routes, options.runs)
    ratio = times["SciPy"].median / times["paths"].median
    equal = all(abs(value - sums["SciPy"]) <= 1e-6 * count * n for value in sums.values())
    return {
        **{name: found.milliseconds() for name, found in times.items()},
        "paths against SciPy": ratio,
        "sums": "equal" if equal else "DIFFER",
        "holds": verdict(ratio >= 1, f"{ratio:.2f} times SciPy's speed") if judged else None,
    }


def _solve(solver: Any, matrices: jax.Array) -> Callable[[], jax.Array]:
    program = jax.jit(lambda m: jm.align.assign(m, solver))
    return lambda: program(matrices)


def _sum(matrices: np.ndarray, columns: np.ndarray) -> float:
    taken = np.take_along_axis(matrices, columns[..., None].astype(np.int64), -1)
    return float(np.sum(taken, dtype=np.float64))


def _correlations(rng: np.random.Generator, n: int) -> np.ndarray:
    """Of units that share half their variance with one of the other model's, in another order."""
    samples = 256
    a = rng.standard_normal((n, samples))
    b = (a + rng.standard_normal((n, samples)))[rng.permutation(n)]
    return np.corrcoef(a, b)[:n, n:].astype(np.float32)


def _dead(rng: np.random.Generator, n: int) -> np.ndarray:
    matrix = _correlations(rng, n)
    matrix[rng.permutation(n)[: n // 2]] = 0
    matrix[:, rng.permutation(n)[: n // 2]] = 0
    return matrix


KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "correlations": _correlations,
    "random": lambda rng, n: rng.standard_normal((n, n)).astype(np.float32),
    "ties": lambda rng, n: rng.integers(0, 4, (n, n)).astype(np.float32),
    "half dead": _dead,
}
