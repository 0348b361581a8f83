"""The sweep: one state, one compiled program over a batch of points, run batch by batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.free_memory import available_memory
from jaxmerge.recipes import Plan, PlanError, load_sources
from jaxmerge.recipes.output import bytes_text
from jaxmerge.sweeping import balance
from jaxmerge.sweeping.evaluator import Evaluator, EvaluatorError
from jaxmerge.sweeping.grid import Grid
from jaxmerge.tree import nearest

Progress = Callable[[int, int], None]

# Beyond this a larger batch gains nothing.
_LARGEST_BATCH = 64
# The share of the free memory that a batch may take.
_SHARE = 0.6

BALANCE = "balance"


@dataclass(frozen=True)
class Sweep:
    """The scores of a grid.

    Attributes:
        grid: the points.
        scores: float64 [points]; more is better; NaN where the evaluator gave NaN.
        parts: float64 [points, parts], what a score is made of: tasks, or sources' cosines.
        kind: "evaluator", or "balance" where the score needs no data: the smallest cosine.
        batch: how many points one call of the program merges.
        compiled: False where the evaluator ran on the host, point by point.
        notes: remarks for the user.
    """

    grid: Grid
    scores: np.ndarray
    parts: np.ndarray
    kind: str
    batch: int
    compiled: bool
    notes: tuple[str, ...]

    @property
    def order(self) -> np.ndarray:
        """The points from best to worst, the earlier first where scores are equal."""
        return np.argsort(np.where(np.isnan(self.scores), np.inf, -self.scores), kind="stable")

    @property
    def best(self) -> int:
        """The best point."""
        return int(self.order[0])


def sweep(
    grid: Grid,
    plan: Plan,
    evaluate: Evaluator | None = None,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Merges and scores every point of a grid.

    The method's `init` runs once. A batch of points is one vmapped program that is traced and
    compiled once; batches follow each other, so that memory holds one batch of merged models. A
    point's candidate is what merging its recipe with the plan's seed gives, but for the rounding
    of sums.

    Args:
        grid: made by `make_grid`.
        plan: the plan of `grid.resolved`.
        evaluate: from the merged tensors by checkpoint name to a score or [tasks] scores, whose
            mean counts; more is better. An evaluator that cannot be traced gets NumPy arrays, one
            candidate at a time. None: the balance score, the smallest cosine between the merged
            task vector and a source's (between the models themselves where there is no base).
        batch: points per call; None: as many as memory holds, at most 64.
        progress: called with the points done and all points.

    Raises:
        CheckpointError: a source is not finite.
        EvaluatorError: the evaluator fails or returns something else.
        PlanError: memory does not hold the sources and one candidate.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"--batch is 1 or more, found {batch}")
    _check_memory(plan)
    models, base = load_sources(plan)
    wide = any(one.dtype == "float64" for tensor in plan.tensors for one in tensor.inputs)
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        runner = _Runner(grid, plan, models, base, evaluate)
        return runner.run(batch, progress)


class _NotTraceable(Exception):
    """The evaluator failed on traced arrays."""


class _Runner:
    def __init__(
        self,
        grid: Grid,
        plan: Plan,
        models: list[dict[str, np.ndarray]],
        base: dict[str, np.ndarray] | None,
        evaluate: Evaluator | None,
    ) -> None:
        self.grid, self.plan, self.evaluate = grid, plan, evaluate
        self.method = grid.resolved.method
        # A tied name has the values and the identity of the name that it is tied to.
        untied = [tensor.name for tensor in plan.tensors if tensor.tied_to is None]
        models = [{name: model[name] for name in untied} for model in models]
        base = None if base is None else {name: base[name] for name in untied}
        donor = models[0] if base is None else base
        self.carried = {
            t.name: donor[t.tied_to or t.name] for t in plan.tensors if t.action == "carry"
        }
        self.state = self.method.init(models, base, dtype=grid.resolved.written_dtype)
        self.balance: balance.Balance | None = None
        if evaluate is None:
            names = [t.name for t in plan.tensors if t.action == "merge" and t.tied_to is None]
            is_source = self.method.base == "source" and base is not None
            sources = [*([base] if is_source and base is not None else []), *models]
            self.balance = balance.prepare(sources, None if is_source else base, names)
        self.key = jax.random.key(plan.seed)
        self.notes: list[str] = []

    def run(self, batch: int | None, progress: Progress | None) -> Sweep:
        size = self._batch_size() if batch is None else batch
        try:
            program, size = self._compiled(size, fits=batch is None)
        except _NotTraceable as failure:
            parts = self._on_host(failure.__cause__, progress)
            return self._result(parts, 1, False)
        parts = self._in_batches(program, size, progress)
        return self._result(parts, size, True)

    def _candidate(self, state: Any, row: Mapping[str, Any], key: Any) -> dict[str, Any]:
        result = self.method.apply(state, {**self.grid.fixed, **row}, key)
        merged = self.method.params_of(result)
        return {t.name: merged[t.tied_to or t.name] for t in self.plan.tensors}

    def _score(self, merged: dict[str, Any], groups: Any) -> jax.Array:
        """[parts], float32."""
        if self.evaluate is None:
            assert self.balance is not None
            return balance.cosines(merged, self.balance._replace(groups=groups))
        try:
            result = jnp.asarray(self.evaluate(merged))
        except Exception as error:
            raise _NotTraceable from error
        return jnp.atleast_1d(_checked(result)).astype(jnp.float32)

    # The compiled route

    def _program(self, state: Any, rows: Any, key: Any, groups: Any) -> jax.Array:
        def one(row: Mapping[str, Any]) -> jax.Array:
            return self._score(self._candidate(state, row, key), groups)

        return jax.vmap(one)(rows)

    def _compiled(self, size: int, *, fits: bool) -> tuple[Any, int]:
        """Traces and compiles; again with a smaller batch where memory would not hold it."""
        size = _even(len(self.grid.points), size)
        while True:
            traced = jax.jit(self._program).trace(*self._arguments(self._rows(0, size)))
            program = traced.lower().compile()
            analysis = program.memory_analysis() if fits and size > 1 else None
            free = available_memory()
            if analysis is None or free is None or analysis.temp_size_in_bytes <= free:
                return program, size
            share = _SHARE * free / analysis.temp_size_in_bytes
            size = _even(len(self.grid.points), max(1, min(size // 2, int(size * share))))

    def _arguments(self, rows: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
        groups = () if self.balance is None else self.balance.groups
        return self.state, rows, self.key, groups

    def _rows(self, start: int, size: int) -> dict[str, np.ndarray]:
        """A batch of points; the last one is filled up with its last point."""
        last = len(self.grid.points) - 1
        chosen = np.minimum(np.arange(start, start + size), last)
        return {name: values[chosen] for name, values in self.grid.swept.items()}

    def _in_batches(self, program: Any, size: int, progress: Progress | None) -> np.ndarray:
        count = len(self.grid.points)
        parts = []
        for start in range(0, count, size):
            part = np.asarray(program(*self._arguments(self._rows(start, size))), np.float64)
            parts.append(part[: count - start])
            if progress is not None:
                progress(min(start + size, count), count)
        return np.concatenate(parts)

    def _batch_size(self) -> int:
        free = available_memory()
        if free is None:
            return 8
        return max(
            1, min(_LARGEST_BATCH, int(_SHARE * free) // max(1, _candidate_bytes(self.plan)))
        )

    # The route of evaluators in NumPy, PyTorch or plain Python

    def _on_host(self, cause: BaseException | None, progress: Progress | None) -> np.ndarray:
        assert self.evaluate is not None
        merge = jax.jit(self._candidate)
        count = len(self.grid.points)
        parts = []
        for i in range(count):
            row = {name: values[i] for name, values in self.grid.swept.items()}
            merged = {name: np.array(a) for name, a in merge(self.state, row, self.key).items()}
            try:
                result = np.asarray(self.evaluate({**merged, **self.carried}))
            except Exception as error:
                unknown = isinstance(error, KeyError) and str(error.args[0]) not in merged
                hint = nearest(str(error.args[0]), merged) if unknown else ""
                raise EvaluatorError(
                    f"the evaluator failed with {type(error).__name__}: {error}{hint}"
                ) from error
            parts.append(np.atleast_1d(_checked(result)).astype(np.float64))
            if parts[-1].shape != parts[0].shape:
                raise EvaluatorError(
                    f"the evaluator returned {parts[0].size} score(s), then {parts[-1].size}"
                )
            if progress is not None:
                progress(i + 1, count)
        self.notes.append(
            f"the evaluator cannot be traced ({type(cause).__name__}): it ran on the host, one "
            "candidate after the other, on NumPy arrays; written with jax.numpy it would be "
            "compiled with the merge"
        )
        return np.stack(parts)

    def _result(self, parts: np.ndarray, batch: int, compiled: bool) -> Sweep:
        kind = BALANCE if self.evaluate is None else "evaluator"
        scores = parts.min(axis=1) if kind == BALANCE else parts.mean(axis=1)
        lost = int(np.isnan(scores).sum())
        if lost == len(scores):
            raise EvaluatorError("every score is NaN")
        if lost:
            self.notes.append(f"{lost} of {len(scores)} scores are NaN and come last")
        return Sweep(self.grid, scores, parts, kind, batch, compiled, tuple(self.notes))


def _checked(result: Any) -> Any:
    numeric = jnp.issubdtype(result.dtype, jnp.number) or result.dtype == bool
    if result.ndim > 1 or result.size == 0 or not numeric:
        raise EvaluatorError(
            "the evaluator must return a number or one number per task, found "
            f"{result.dtype}{list(result.shape)}"
        )
    if jnp.issubdtype(result.dtype, jnp.complexfloating):
        raise EvaluatorError("the evaluator returned complex scores, which have no order")
    return result


def _even(count: int, size: int) -> int:
    """The batch size that covers all points in as few batches with the least filling."""
    return math.ceil(count / math.ceil(count / size))


def _elements(plan: Plan) -> int:
    merged = [t for t in plan.tensors if t.action == "merge" and t.tied_to is None]
    return sum(math.prod(tensor.shape) for tensor in merged)


def _candidate_bytes(plan: Plan) -> int:
    """What one candidate takes: float32 parts of every model, and the merge."""
    return 4 * _elements(plan) * (len(plan.models) + 3)


def _check_memory(plan: Plan) -> None:
    free = available_memory()
    # As loaded, in the state, and beside it for the balance score.
    needed = 3 * plan.bytes_read + _candidate_bytes(plan)
    if free is not None and needed > free:
        raise PlanError(
            [
                f"the sweep keeps all sources in memory and needs about {bytes_text(needed)}; "
                f"{bytes_text(free)} are free"
            ]
        )
