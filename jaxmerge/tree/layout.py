"""The static layout: how each leaf of a tree relates to the tensor of a checkpoint that it came from."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.tree.depth import depths
from jaxmerge.tree.paths import flatten


@dataclass(frozen=True)
class TensorLayout:
    """Where one leaf comes from.

    A leaf (one layer of it, where layers are stacked on axis 0) becomes the checkpoint's tensor by a transposition to
    `axes`, then a reshape to `shape`. Random draws, row-wise statistics, spectra, the order of ties and "per tensor"
    scope refer to the checkpoint's tensor, so that a merge gives the same numbers in either form.

    Attributes:
      names: the tensor's name in the checkpoint; one name per layer where the leaf is stacked.
      axes: the leaf's axes in the checkpoint's order, or None for the leaf's own order.
      shape: the checkpoint's shape after the transposition, or None where it is the transposed shape.
      stacked: axis 0 of the leaf runs over layers (`names` has one entry per layer).
      outputs: the checkpoint tensor's output axes.
      inputs: its input axes; None for all the others.
      depths: how deep each of `names` lies in its model, 0 to 1; None to read it from the names (see `depths`).
    """

    names: tuple[str, ...]
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    stacked: bool = False
    outputs: tuple[int, ...] = (0,)
    inputs: tuple[int, ...] | None = None
    depths: tuple[float, ...] | None = None

    def to_checkpoint(self, leaf: jax.Array) -> jax.Array:
        """Brings one layer of the leaf into the checkpoint's element order."""
        if self.axes is not None:
            leaf = jnp.transpose(leaf, self.axes)
        return leaf if self.shape is None else jnp.reshape(leaf, self.shape)

    def from_checkpoint(self, tensor: jax.Array, leaf_shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `to_checkpoint`; `leaf_shape` is the shape of one layer of the leaf."""
        if self.axes is None:
            return tensor if self.shape is None else jnp.reshape(tensor, leaf_shape)
        tensor = jnp.reshape(tensor, tuple(leaf_shape[axis] for axis in self.axes))
        inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return jnp.transpose(tensor, inverse)

    def checkpoint_shape(self, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The checkpoint tensor's shape, from the shape of one layer of the leaf."""
        if self.shape is not None:
            return self.shape
        return leaf_shape if self.axes is None else tuple(leaf_shape[axis] for axis in self.axes)

    def checkpoint_axes(
        self, axes: tuple[int, ...], leaf_shape: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """The checkpoint tensor's axes that hold the given axes of one layer of the leaf.

        Returns:
          The axes in ascending order, or None where the reshape mixes the given axes with others.

        Example:
          >>> heads = TensorLayout(("q.weight",), axes=(1, 2, 0), shape=(4, 6))
          >>> heads.checkpoint_axes((0,), (6, 2, 2)), heads.checkpoint_axes((1, 2), (6, 2, 2))
          ((1,), (0,))
        """
        order = range(len(leaf_shape)) if self.axes is None else self.axes
        moved = [(leaf_shape[axis], axis in axes) for axis in order]
        if self.shape is None:
            return tuple(i for i, (_, inside) in enumerate(moved) if inside)
        found: list[int] = []
        rest = [(size, inside) for size, inside in moved if size != 1]
        group: list[int] = []
        for axis, size in enumerate(self.shape):
            if size == 1:
                continue
            group.append(axis)
            want, have, sides = math.prod(self.shape[i] for i in group), 1, set()
            taken = 0
            while have < want:
                have *= rest[taken][0]
                sides.add(rest[taken][1])
                taken += 1
            if have > want:
                continue
            if len(sides) > 1:
                return None
            found += group if True in sides else []
            rest, group = rest[taken:], []
        return tuple(found)

    @property
    def transform(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """What decides whether two leaves can be computed as one batch."""
        return self.axes, self.shape

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raises a ValueError where the layout does not fit a leaf of this shape."""
        one = shape[1:] if self.stacked else shape
        if self.stacked and (not shape or len(self.names) != shape[0]):
            raise ValueError(
                f"layout of {path!r} names {len(self.names)} layers, but the leaf's shape is {shape}"
            )
        if not self.stacked and len(self.names) != 1:
            raise ValueError(f"layout of {path!r} has {len(self.names)} names for one tensor")
        if self.depths is not None and len(self.depths) != len(self.names):
            raise ValueError(
                f"layout of {path!r} has {len(self.depths)} depths for {len(self.names)} names"
            )
        if self.axes is not None and sorted(self.axes) != list(range(len(one))):
            raise ValueError(f"layout of {path!r}: axes {self.axes} do not permute shape {one}")
        if self.shape is not None and math.prod(self.shape) != math.prod(one):
            raise ValueError(f"layout of {path!r}: shape {self.shape} does not hold {one}")


class Layout(Mapping[str, TensorLayout]):
    """An immutable, hashable mapping from a leaf's path to its `TensorLayout`.

    A path that it does not hold is its own name in its own order.

    Example:
      >>> layout = Layout({"fc/kernel": TensorLayout(("fc.weight",), axes=(1, 0))})
      >>> layout.of("fc/kernel").names, layout.of("fc/bias").names
      (('fc.weight',), ('fc/bias',))
    """

    def __init__(self, tensors: Mapping[str, TensorLayout] | None = None) -> None:
        self._tensors = dict(tensors or {})
        self._hash = hash(tuple(sorted((path, hash(t)) for path, t in self._tensors.items())))

    def of(self, path: str) -> TensorLayout:
        """The layout of a leaf, the identity where none was given."""
        return self._tensors.get(path) or TensorLayout((path,))

    def depths(self, paths: Iterable[str]) -> dict[str, tuple[float, ...]]:
        """How deep each leaf's tensors lie in the model that these paths make up; see `jaxmerge.tree.depths`."""
        layouts = {path: self.of(path) for path in paths}
        named = depths(name for layout in layouts.values() for name in layout.names)
        return {
            path: layout.depths or tuple(named[name] for name in layout.names)
            for path, layout in layouts.items()
        }

    def __getitem__(self, path: str) -> TensorLayout:
        return self._tensors[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self._tensors == other._tensors

    def __repr__(self) -> str:
        return f"Layout({self._tensors!r})"


def stacked_layout(tree: Any, prefixes: Mapping[str, str]) -> Layout:
    """Makes the layout of a tree in which some leaves hold all layers, stacked on axis 0.

    Args:
      tree: the parameters.
      prefixes: from a path's beginning to the beginning of the unstacked name, with ``{layer}`` where the layer's
        index goes.

    Returns:
      A layout that names every layer of the leaves under these prefixes.

    Raises:
      ValueError: a prefix matches no leaf.

    Example:
      >>> layout = stacked_layout({"layers": {"w": jnp.zeros((2, 3))}}, {"layers/": "layers/{layer}/"})
      >>> layout["layers/w"].names
      ('layers/0/w', 'layers/1/w')
    """
    tensors: dict[str, TensorLayout] = {}
    leaves, _ = flatten(tree)
    for prefix, template in prefixes.items():
        found = [path for path in leaves if path.startswith(prefix)]
        if not found:
            raise ValueError(f"no leaf's path begins with {prefix!r}")
        for path in found:
            names = tuple(
                template.format(layer=layer) + path[len(prefix) :]
                for layer in range(leaves[path].shape[0])
            )
            tensors[path] = TensorLayout(names, stacked=True)
    return Layout(tensors)
