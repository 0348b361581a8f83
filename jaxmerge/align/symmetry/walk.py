"""Walks through a traced program and ties the axes of its values together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from jaxmerge.align.symmetry.atoms import Atom, Label, fix, forget, unify
from jaxmerge.align.symmetry.rules import moves_only, rule_of
from jaxmerge.align.symmetry.values import (
    Known,
    Traced,
    Uses,
    Value,
    give_up,
    labels_of,
    opaque,
    shape_of,
)
from jaxmerge.tracing.interpreter import CALLS, called, evaluate, loop_counts


def walk(
    jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Value], uses: Uses
) -> list[Value]:
    """Runs a program on labels.

    Args:
      jaxpr: the program.
      consts: its constants, arrays or values.
      arguments: a value for each of its arguments.
      uses: where the uses of parameter leaves are noted.

    Returns:
      A value for each result.
    """
    known: dict[Var, Value] = dict(zip(jaxpr.constvars, map(_as_value, consts), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Value:
        return Known(atom.val) if isinstance(atom, Literal) else known[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read(atom) for atom in eqn.invars]
        for value in operands:
            if isinstance(value, Traced) and value.path is not None:
                uses.seen.add(value.path)
                if not moves_only(eqn.primitive.name):
                    atoms = uses.read.setdefault(value.path, [])
                    atoms += [a for label in value.labels for s in label or [] for a in s]
        uses.within.append(i)
        uses.operations.append((tuple(uses.within), eqn, operands))
        known.update(zip(eqn.outvars, _step(eqn, operands, uses), strict=True))
        uses.within.pop()
    return [read(atom) for atom in jaxpr.outvars]


def _as_value(constant: Any) -> Value:
    return constant if isinstance(constant, Traced | Known) else Known(constant)


def _step(eqn: JaxprEqn, operands: list[Value], uses: Uses) -> list[Value]:
    name = eqn.primitive.name
    arrays = [operand.array for operand in operands if isinstance(operand, Known)]
    if len(arrays) == len(operands):
        # What depends on no argument is known, also where the walk is part of a trace.
        with jax.ensure_compile_time_eval():
            return [Known(value) for value in evaluate(eqn, arrays)]
    if name in CALLS:
        return walk(*called(eqn), operands, uses)
    if name == "scan":
        return _scan(eqn, operands, uses)
    if name == "while":
        return _while(eqn, operands, uses)
    if name == "cond":
        return _cond(eqn, operands, uses)
    rule = rule_of(name)
    if rule is None:
        give_up(operands)
        return [opaque(shape_of(out)) for out in eqn.outvars]
    return rule(eqn, operands, uses)


def _carried(state: Sequence[Value], shapes: Sequence[tuple[int, ...]]) -> list[Value]:
    """What a loop carries: it begins as the state, and may differ along an axis where the state does not."""
    carried: list[Value] = []
    for value, shape in zip(state, shapes, strict=True):
        labels: list[Label] = []
        for label, size in zip(labels_of(value), shape, strict=True):
            mine: Label = [[Atom(size)]] if size > 1 else None
            labels.append(unify(mine, label))
        carried.append(Traced(labels))
    return carried


def _close(carried: Sequence[Value], results: Sequence[Value]) -> None:
    """What a loop carries out of a turn is what it carries into the next."""
    for before, after in zip(carried, results, strict=True):
        for one, other in zip(labels_of(before), labels_of(after), strict=True):
            unify(one, other)


def _shapes(values: Sequence[Any]) -> list[tuple[int, ...]]:
    return [shape_of(value) for value in values]


def _scan(eqn: JaxprEqn, operands: list[Value], uses: Uses) -> list[Value]:
    """Every layer along the scanned axis may be relabelled by itself where nothing that is carried ties it."""
    first, count = loop_counts(eqn)
    consts, state, stacks = (
        operands[:first],
        operands[first : first + count],
        operands[first + count :],
    )
    turns = Atom(eqn.params["length"], fixed=True)
    carried = _carried(state, _shapes(eqn.invars[first : first + count]))
    slices: list[Value] = []
    for stack in stacks:
        labels = labels_of(stack)
        if turns.size > 1:
            unify(labels[0], [[turns]])
        slices.append(Traced(labels[1:], stack.path if isinstance(stack, Traced) else None))
    body, constants = called(eqn)
    results = walk(body, constants, [*consts, *carried, *slices], uses)
    _close(carried, results[:count])
    # What leaves the loop as it is in the last turn does not depend on the turn.
    forget([label for value in carried for label in labels_of(value)], [[[turns]]])
    stacked: list[Value] = [
        Traced([[[turns]] if turns.size > 1 else None, *labels_of(value)])
        for value in results[count:]
    ]
    return [*carried, *stacked]


def _while(eqn: JaxprEqn, operands: list[Value], uses: Uses) -> list[Value]:
    params = eqn.params
    tests, bodies = params["cond_nconsts"], params["body_nconsts"]
    state = operands[tests + bodies :]
    carried = _carried(state, _shapes(eqn.invars[tests + bodies :]))
    _closed(params["cond_jaxpr"], [*operands[:tests], *carried], uses)
    results = _closed(params["body_jaxpr"], [*operands[tests : tests + bodies], *carried], uses)
    _close(carried, results)
    return carried


def _cond(eqn: JaxprEqn, operands: list[Value], uses: Uses) -> list[Value]:
    _index, *rest = operands
    branches = [_closed(branch, rest, uses) for branch in eqn.params["branches"]]
    results: list[Value] = []
    for same, out in zip(zip(*branches, strict=True), eqn.outvars, strict=True):
        labels: list[Label] = [None] * len(shape_of(out))
        for value in same:
            labels = [unify(a, b) for a, b in zip(labels, labels_of(value), strict=True)]
        results.append(Traced(labels))
    return results


def _closed(program: ClosedJaxpr, arguments: list[Value], uses: Uses) -> list[Value]:
    return walk(program.jaxpr, program.consts, arguments, uses)


def trace(function: Any, params: Any, inputs: tuple[Any, ...]) -> ClosedJaxpr:
    """The program of ``function(params, *inputs)``; arrays or shapes."""
    shaped = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), (params, inputs))
    return jax.make_jaxpr(function)(shaped[0], *shaped[1])


def settle(outputs: Sequence[Value]) -> None:
    """The results of the whole program are what must not change."""
    for value in outputs:
        if isinstance(value, Traced):
            for label in value.labels:
                fix(label)
