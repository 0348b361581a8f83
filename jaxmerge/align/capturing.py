"""Runs a program and hands out what some of its operations read; the model is not edited."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jaxmerge.align.sites import Site
from jaxmerge.align.symmetry.values import Position
from jaxmerge.align.symmetry.walk import trace
from jaxmerge.tracing.interpreter import CALLS, called, evaluate, loop_counts

Wanted = Mapping[Position, tuple[int, ...]]
Captured = dict[tuple[Position, int], jax.Array]


def activations(
    sites: Mapping[str, Sequence[Site]],
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
) -> dict[str, jax.Array]:
    """The activations of every node's units.

    Pure: may run inside jit, and under vmap over models.

    Args:
      sites: where each node is looked at, see `jaxmerge.align.find_sites`.
      apply_fn, params, inputs: the model and its inputs; the program must be the one in which the sites were found.

    Returns:
      Per node float32 [samples, units]: samples are all examples and positions (one site after the other where there
      are several), units in the order of the node's own product of parents and itself. Where layers are scanned,
      [layers, samples, units].
    """
    program = trace(apply_fn, params, inputs)
    wanted: dict[Position, tuple[int, ...]] = {}
    for found in sites.values():
        for site in found:
            wanted[site.position] = (*wanted.get(site.position, ()), site.operand)
    arguments = [jnp.asarray(leaf) for leaf in jax.tree.leaves((params, inputs))]
    captured: Captured = {}
    _run(program.jaxpr, program.consts, arguments, wanted, captured)
    return {
        name: jnp.concatenate(
            [_samples(captured[site.position, site.operand], site) for site in found], axis=-2
        )
        for name, found in sites.items()
        if found
    }


def _samples(array: jax.Array, site: Site) -> jax.Array:
    """[(layers,) samples, units]; loops have put axes before those of one turn."""
    loops = array.shape[: array.ndim - site.rank]
    array = array.reshape(*loops, *site.shape)
    front = range(len(loops))
    units = [len(loops) + axis for axis in site.units]
    rest = [i for i in range(len(loops), array.ndim) if i not in units]
    placed = jnp.transpose(array, [*front, *rest, *units])
    count = math.prod(site.shape[axis] for axis in site.units)
    return placed.reshape(*loops, -1, count).astype(jnp.promote_types(array.dtype, jnp.float32))


def _run(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    wanted: Wanted,
    captured: Captured,
    within: Position = (),
) -> list[Any]:
    known: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        position = (*within, i)
        operands = [read(atom) for atom in eqn.invars]
        for operand in wanted.get(position, ()):
            captured[position, operand] = operands[operand]
        inside = [p for p in wanted if p[: len(position)] == position and p != position]
        if inside and eqn.primitive.name in CALLS:
            results = _run(*called(eqn), operands, wanted, captured, position)
        elif inside and eqn.primitive.name == "scan":
            results = _scan(eqn, operands, wanted, captured, position)
        else:
            results = evaluate(eqn, operands)
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _scan(
    eqn: JaxprEqn, operands: list[Any], wanted: Wanted, captured: Captured, position: Position
) -> list[Any]:
    """A scan that also stacks what is captured in its turns."""
    first, count = loop_counts(eqn)
    consts, state, stacks = (
        operands[:first],
        operands[first : first + count],
        operands[first + count :],
    )
    keys: list[tuple[Position, int]] = []

    def body(carried: list[Any], slices: list[Any]) -> tuple[list[Any], Any]:
        mine: Captured = {}
        results = _run(*called(eqn), [*consts, *carried, *slices], wanted, mine, position)
        keys[:] = list(mine)
        return results[:count], (results[count:], list(mine.values()))

    final, (stacked, found) = jax.lax.scan(
        body,
        list(state),
        list(stacks),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    captured.update(zip(keys, found, strict=True))
    return [*final, *stacked]
