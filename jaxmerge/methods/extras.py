"""What some methods need beside the models: values for every parameter, or Gram matrices of linear layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.tree import TensorLayout, flatten, nearest

Kind = Literal["like", "gram"]
Side = Literal["inputs", "outputs"]


@dataclass(frozen=True)
class Extra:
    """What a method needs beside the models.

    Attributes:
      meaning: one line for tables.
      kind: "like": a tree with the model's floating-point leaves and their shapes; "gram": a mapping from the path of a
        leaf to a `Gram`, or to its bare matrix where the leaf is [outputs, ...inputs]. Leaves without one are allowed.
      per: one for each "model", in a sequence, or one that all share ("shared").
      side: which side of a layer a "gram" is of; the one of the "inputs" says which axes are inputs.
      required: whether the method can do without.
    """

    meaning: str
    kind: Kind
    per: Literal["model", "shared"] = "model"
    required: bool = True
    side: Side = "inputs"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gram:
    """The mean of x x^T over what goes into (or comes out of) a linear layer.

    Attributes:
      matrix: float [k, k]; [layers, k, k] where the leaf holds stacked layers.
      axes: the axes of the leaf (of one layer of it) that x runs over, in the order in which x is flattened (static).
    """

    matrix: jax.Array
    axes: tuple[int, ...] = field(metadata={"static": True})


Gathered = dict[str, tuple[dict[str, Any], ...]]


def gather(
    specs: Mapping[str, Extra],
    given: Mapping[str, Any] | None,
    models: int,
    shapes: Mapping[str, tuple[int, ...]],
    method: str,
) -> Gathered:
    """Checks what was given and brings it into one form.

    Args:
      specs: what the method declares.
      given: what the caller gave, by name.
      models: how many models are merged.
      shapes: the shapes of the leaves that are merged, by path.
      method: the method's name, for messages.

    Returns:
      By name, a tuple (one entry per model, or one) of values by path; names that were not given are left out.

    Raises:
      ValueError: a name that the method lacks or misses, a wrong number, a wrong path or shape.
    """
    given = given or {}
    for name in given:
        if name not in specs:
            known = ", ".join(specs) or "none"
            raise ValueError(
                f"{method} takes no extra {name!r}{nearest(name, specs)}; it takes: {known}"
            )
    gathered: Gathered = {}
    for name, spec in specs.items():
        if name not in given:
            if spec.required:
                raise ValueError(f"{method} needs extras={{{name!r}: ...}}: {spec.meaning}")
            continue
        trees = [given[name]] if spec.per == "shared" else _sequence(given[name], models, name)
        check = _like if spec.kind == "like" else _grams
        gathered[name] = tuple(
            check(tree, shapes, name if spec.per == "shared" else f"{name}[{i}]")
            for i, tree in enumerate(trees)
        )
        if spec.kind == "gram":
            _check_same_leaves(gathered[name], name)
    return gathered


def gram_axes(
    gram: Any, path: str, layout: TensorLayout, shape: tuple[int, ...], side: Side = "inputs"
) -> tuple[int, ...]:
    """The checkpoint's axes that a Gram matrix runs over; `shape` is that of one layer of the leaf."""
    if not isinstance(gram, Gram):
        axes = range(len(layout.checkpoint_shape(shape)))
        inputs = layout.inputs or tuple(axis for axis in axes if axis not in layout.outputs)
        return inputs if side == "inputs" else tuple(axis for axis in axes if axis not in inputs)
    found = layout.checkpoint_axes(gram.axes, shape)
    if found is None:
        raise ValueError(
            f"the layout of {path!r} mixes the axes {gram.axes} of a Gram matrix with others"
        )
    return found


def gram_matrix(gram: Any, layout: TensorLayout, shape: tuple[int, ...]) -> jax.Array:
    """The matrix with its rows and columns in the checkpoint's order, [k, k] or [layers, k, k]."""
    if not isinstance(gram, Gram):
        return jnp.asarray(gram)
    matrix = jnp.asarray(gram.matrix)
    order = range(len(shape)) if layout.axes is None else layout.axes
    places = sorted(range(len(gram.axes)), key=lambda i: order.index(gram.axes[i]))
    if places == list(range(len(gram.axes))):
        return matrix
    sizes = [shape[axis] for axis in gram.axes]
    index = np.transpose(np.arange(matrix.shape[-1]).reshape(sizes), places).ravel()
    return matrix[..., index[:, None], index[None]]


def _sequence(trees: Any, models: int, name: str) -> Sequence[Any]:
    if not isinstance(trees, list | tuple):
        raise ValueError(
            f"extras[{name!r}] needs a list with one entry per model, found {type(trees).__name__}"
        )
    if len(trees) != models:
        raise ValueError(
            f"extras[{name!r}] needs {models} entries (one per model), found {len(trees)}"
        )
    return trees


def _like(tree: Any, shapes: Mapping[str, tuple[int, ...]], name: str) -> dict[str, Any]:
    leaves, _ = flatten(tree)
    for path, shape in shapes.items():
        if path not in leaves:
            raise ValueError(f"extra {name} lacks tensor {path!r}{nearest(path, leaves)}")
        if tuple(np.shape(leaves[path])) != shape:
            raise ValueError(
                f"extra {name}: tensor {path!r} should have shape {list(shape)}, "
                f"found {list(np.shape(leaves[path]))}"
            )
    return {path: leaves[path] for path in shapes}


def _grams(tree: Any, shapes: Mapping[str, tuple[int, ...]], name: str) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"extra {name} needs a mapping from paths to Gram matrices, found {type(tree).__name__}"
        )
    for path, gram in tree.items():
        if path not in shapes:
            raise ValueError(
                f"extra {name} has {path!r}, which is not merged{nearest(path, shapes)}"
            )
        matrix = gram.matrix if isinstance(gram, Gram) else gram
        found = np.shape(matrix)
        if len(found) not in (2, 3) or found[-1] != found[-2]:
            raise ValueError(
                f"extra {name}: the Gram matrix of {path!r} should be square, found shape {list(found)}"
            )
    return dict(tree)


def _check_same_leaves(trees: Sequence[Mapping[str, Any]], name: str) -> None:
    for i, tree in enumerate(trees):
        for path in trees[0].keys() ^ tree.keys():
            lacks, has = (i, 0) if path in trees[0] else (0, i)
            raise ValueError(f"extra {name}[{lacks}] lacks {path!r}, which {name}[{has}] has")
