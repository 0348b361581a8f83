"""How much memory candidates take, read from a trace before anything is compiled."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

# An accelerator wants as many at once as there is room for. A CPU is faster one by one as soon as a candidate is more
# than a few numbers: batched matrix products are slow there, and a chunk leaves the caches.
_CPU_CHUNK = 256 << 10
_SHARE = 0.6


def bytes_of_candidate(closed: core.ClosedJaxpr, varying: Sequence[bool]) -> int:
    """The largest sum of values alive at once that differ between candidates.

    An upper bound: the compiler fuses, and some values never exist.

    Args:
      closed: the trace of one candidate's evaluation.
      varying: which of its inputs differ between candidates.
    """
    return _peak(closed.jaxpr, list(varying))


def plan_chunk(candidates: int, nbytes: int, free: int | None, platform: str) -> int:
    """How many candidates to evaluate at once on a device.

    Args:
      candidates: how many there are for it.
      nbytes: of one.
      free: bytes free on the device; None where the system does not tell.
      platform: "cpu", "gpu", "tpu".

    Raises:
      ValueError: one candidate alone does not fit.
    """
    if free is not None and nbytes > free:
        raise ValueError(
            f"one candidate needs about {nbytes / 1e9:.3g} GB of memory; {free / 1e9:.3g} GB are free "
            "on the device. Score fewer examples at once (jaxmerge.evaluation.over_batches), or spread "
            "the models over a mesh"
        )
    room = _SHARE * free if free is not None else 8 * nbytes
    if platform == "cpu":
        room = min(room, _CPU_CHUNK)
    return max(1, min(candidates, int(room // max(nbytes, 1))))


def _peak(jaxpr: Any, varying: list[bool]) -> int:
    """The peak within a jaxpr, its inputs not counted."""
    varies = {variable for variable, one in zip(jaxpr.invars, varying, strict=True) if one}
    last = {variable: len(jaxpr.eqns) for variable in _variables(jaxpr.outvars)}
    for i, equation in reversed(list(enumerate(jaxpr.eqns))):
        for variable in _variables([*equation.invars, *equation.outvars]):
            last.setdefault(variable, i)
    alive = peak = 0
    made: dict[Any, int] = {}
    for i, equation in enumerate(jaxpr.eqns):
        inputs = [isinstance(one, core.Var) and one in varies for one in equation.invars]
        if any(inputs):
            inner = [_peak(sub, _inner(sub, inputs)) for sub in _subjaxprs(equation)]
            for variable in equation.outvars:
                varies.add(variable)
                made[variable] = _size(variable)
                alive += made[variable]
            peak = max(peak, alive + max(inner, default=0))
        for variable in set(_variables([*equation.invars, *equation.outvars])):
            if last[variable] == i:
                alive -= made.pop(variable, 0)
    return peak


def _variables(atoms: Sequence[Any]) -> list[Any]:
    """Without literals."""
    return [atom for atom in atoms if isinstance(atom, core.Var)]


def _inner(sub: Any, inputs: list[bool]) -> list[bool]:
    same = len(sub.invars) == len(inputs)
    # The inputs of a branch or of a loop's body come after others; all may vary.
    return inputs if same else [True] * len(sub.invars)


def _subjaxprs(equation: Any) -> list[Any]:
    found = []
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found


def _size(variable: Any) -> int:
    aval = variable.aval
    if not hasattr(aval, "shape"):
        return 0
    itemsize = 8 if jnp.issubdtype(aval.dtype, jax.dtypes.extended) else aval.dtype.itemsize
    return math.prod(aval.shape) * itemsize
