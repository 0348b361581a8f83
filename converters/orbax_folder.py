"""Trees of arrays in orbax's format: written and read in parallel, onto any mesh."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from numpy.typing import DTypeLike

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.families.rules import listed
from jaxmerge.converters.model_config import ModelConfig
from jaxmerge.converters.model_saving import check_leaves
from jaxmerge.tree import flatten, matches, unflatten

# A host reads the chunks that its part touches: they must be smaller than a part.
_CHUNK = 1 << 24
_KEY = "jaxmerge"

Specs = Mapping[str, PartitionSpec]
"""From patterns of paths (see `jaxmerge.tree.matches`) to how these leaves are split; the first match decides."""


def save_orbax(path: str | os.PathLike[str], tree: Any, config: ModelConfig | None = None) -> None:
    """Writes a tree of arrays as an orbax checkpoint; of arrays spread over hosts each host writes its part.

    Called on all hosts. The folder appears under its name when it is complete.

    Args:
      path: the folder, which must not exist.
      tree: the variables of a model, or any tree of NumPy and JAX arrays.
      config: what `load_model` returned; it is kept beside the arrays, so that the model can be saved in its own
        layout later.

    Raises:
      CheckpointError: the folder exists, a leaf is no array, or the leaves are not those that the config says.

    Example:
      >>> import tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "tree")
      >>> save_orbax(path, {"w": np.ones((2, 3), np.float32)})
      >>> tree, config = load_orbax(path)
      >>> tree["w"].shape, config
      ((2, 3), None)
    """
    from orbax.checkpoint import v1

    path = os.path.abspath(path)
    if os.path.exists(path):
        raise CheckpointError(f"{path}: exists already; remove it or choose another folder")
    leaves, definition = flatten(tree)
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise CheckpointError(
                f"{path}: leaf {name!r}: expected an array, found {type(leaf).__name__}"
            )
        if leaf.size == 0:
            raise CheckpointError(
                f"{path}: leaf {name!r} {list(leaf.shape)}: orbax holds no arrays without elements"
            )
    if config is not None:
        check_leaves(leaves, config, path)
    # orbax refuses NumPy's scalars, not its arrays without axes.
    arrays = [leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for leaf in leaves.values()]
    context = v1.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    with context:
        v1.save(
            path,
            unflatten(definition, arrays),
            custom_metadata=None if config is None else {_KEY: config.to_json()},
        )


def load_orbax(
    path: str | os.PathLike[str],
    *,
    like: Any = None,
    mesh: Mesh | None = None,
    sharding: Specs | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Any, ModelConfig | None]:
    """Reads an orbax checkpoint, each host the parts of its own devices only.

    Args:
      path: the folder, which `save_orbax` or orbax itself wrote.
      like: a tree of the same structure, whose containers the result has; None: dicts and lists as orbax finds them
        (tuples become lists, integer keys text).
      mesh: the devices to spread the arrays over; None: the default device.
      sharding: how: from patterns of paths to a `PartitionSpec`, first match first; what none matches is on all
        devices.
      dtype: of the floating-point leaves; None: each as it is stored.

    Returns:
      tree: JAX arrays.
      config: the model's description, None if none was saved.

    Raises:
      CheckpointError: no orbax checkpoint, a tree of another structure, a pattern that matches nothing, an axis that
        the mesh does not divide, or a dtype that JAX holds only with `jax_enable_x64`.

    Example:
      >>> import tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "tree")
      >>> save_orbax(path, {"w": np.ones((8, 3), np.float32), "b": np.ones(3, np.float32)})
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> tree, _ = load_orbax(path, mesh=mesh, sharding={"w": jax.P("data")})
      >>> tree["w"].sharding.spec, tree["b"].sharding.spec
      (P('data',), P())
    """
    from orbax.checkpoint import v1

    path = os.path.abspath(path)
    try:
        found = v1.metadata(path)
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: not an orbax checkpoint") from None
    stored, definition = flatten(found.metadata)
    if like is not None:
        wanted, definition = flatten(like)
        if differing := wanted.keys() ^ stored.keys():
            raise CheckpointError(
                f"{path}: another structure than the tree given: only one has "
                f"{listed(sorted(differing))}"
            )
        # As text, numbers as keys have another order.
        stored = {name: stored[name] for name in wanted}
    if sharding is not None and mesh is None:
        raise CheckpointError(f"{path}: a sharding needs a mesh")
    specs = _specs(stored, sharding or {}, path)
    abstract = [
        _abstract(path, name, leaf.shape, leaf.dtype, dtype, _placed(mesh, specs[name]))
        for name, leaf in stored.items()
    ]
    described = (found.custom_metadata or {}).get(_KEY)
    config = None if described is None else ModelConfig.from_json(described)
    if config is not None:
        check_leaves(stored, config, path)
    return v1.load(path, unflatten(definition, abstract)), config


def _specs(leaves: Mapping[str, Any], sharding: Specs, path: str) -> dict[str, PartitionSpec]:
    for pattern in sharding:
        if not any(matches(name, pattern) for name in leaves):
            raise CheckpointError(f"{path}: the pattern {pattern!r} matches no leaf")
    return {
        name: next(
            (spec for pattern, spec in sharding.items() if matches(name, pattern)), PartitionSpec()
        )
        for name in leaves
    }


def _placed(mesh: Mesh | None, spec: PartitionSpec) -> Sharding:
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
    return NamedSharding(mesh, spec)


def _abstract(
    path: str,
    name: str,
    shape: tuple[int, ...],
    stored: np.dtype,
    dtype: DTypeLike | None,
    sharding: Sharding,
) -> jax.ShapeDtypeStruct:
    wanted = jnp.dtype(dtype) if dtype and jnp.issubdtype(stored, jnp.floating) else stored
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise CheckpointError(
            f"{path}: leaf {name!r} is {wanted}, which JAX holds only with jax_enable_x64; or give "
            "a dtype"
        )
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise CheckpointError(f"{path}: leaf {name!r} {list(shape)}: {error}") from None
    return jax.ShapeDtypeStruct(shape, wanted, sharding=sharding)
