"""The symmetry of a model, derived from its program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmerge.align.spec import PermutationSpec
from jaxmerge.align.symmetry.atoms import Atom, Label, fixed_axis
from jaxmerge.align.symmetry.reading import read_spec
from jaxmerge.align.symmetry.values import Traced, Uses
from jaxmerge.align.symmetry.walk import settle, trace, walk
from jaxmerge.tree import flatten


def symmetry(apply_fn: Callable[..., Any], params: Any, *inputs: Any) -> PermutationSpec:
    """Derives which units of a model may be permuted without a change of its function.

    The program of ``apply_fn(params, *inputs)`` is walked through once. Every axis of every parameter begins as its
    own; each operation ties axes together (a sum those of its terms, a product of matrices those that it contracts),
    splits them (a reshape to heads or groups, a slice of a fused projection) or fixes them (what the program tells
    apart: inputs, outputs, positions, the pairs of a rotary embedding). Units within a head or a group are permuted
    separately in each of them, those of stacked layers separately in each layer. An operation that is not known fixes
    what it reads: that costs freedom, never soundness. `jaxmerge.align.verify` tests the result on numbers.

    Args:
      apply_fn: a traceable function of parameters and inputs, as it is evaluated (no dropout).
      params: any pytree of arrays, or of `jax.ShapeDtypeStruct`s.
      *inputs: what else it takes, arrays or shapes.

    Returns:
      A `PermutationSpec`.

    Raises:
      ValueError: there is no parameter, or the program's result depends on none.

    Example:
      >>> import jax.numpy as jnp
      >>> mlp = lambda p, x: jnp.tanh(x @ p["fc1"]["w"] + p["fc1"]["b"][None]) @ p["fc2"]["w"]
      >>> params = {"fc1": {"w": jnp.ones((2, 8)), "b": jnp.ones(8)}, "fc2": {"w": jnp.ones((8, 3))}}
      >>> spec = symmetry(mlp, params, jnp.ones((1, 2)))
      >>> [(node.name, node.size) for node in spec.nodes], [path for path, _ in spec.leaves]
      ([('fc1', 8)], ['fc1/b', 'fc1/w', 'fc2/w'])

    Reference:
      Hecht-Nielsen, On the Algebraic Structure of Feedforward Network Weight Spaces, 1990. Lim et al., Graph
      Metanetworks for Processing Diverse Neural Architectures, ICLR 2024.
    """
    labels, uses = labelled(apply_fn, params, inputs)
    return read_spec(labels, uses)


def labelled(
    apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]
) -> tuple[dict[str, list[Label]], Uses]:
    """The labels of every parameter's axes, and how the program uses them; arguments as for `symmetry`."""
    leaves, _ = flatten(params)
    if not leaves:
        raise ValueError("there are no parameters: expected a pytree of arrays, found an empty one")
    program = trace(apply_fn, params, inputs)
    labels = {path: _own_axes(tuple(np.shape(leaf))) for path, leaf in leaves.items()}
    arguments: list[Any] = [Traced(list(axes), path) for path, axes in labels.items()]
    given = program.jaxpr.invars[len(arguments) :]
    arguments += [Traced([fixed_axis(n) for n in atom.aval.shape]) for atom in given]
    uses = Uses(
        {path: [None if a is None else a[0][0] for a in axes] for path, axes in labels.items()}
    )
    settle(walk(program.jaxpr, program.consts, arguments, uses))
    return labels, uses


def _own_axes(shape: tuple[int, ...]) -> list[Label]:
    """A leaf's axes before anything is known: each may depend on all others."""
    atoms = [Atom(size) if size > 1 else None for size in shape]
    for atom in atoms:
        if atom is not None:
            atom.contexts = [tuple(a for a in atoms if a is not None and a is not atom)]
    return [None if atom is None else [[atom]] for atom in atoms]
