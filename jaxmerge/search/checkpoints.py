"""Where a search has got to, kept by orbax so that it goes on after a crash to the same result."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

_PREFIX = "generation_"
_KEY = "jaxmerge.search"


def latest(folder: Path) -> Path | None:
    """The checkpoint of the latest generation; None where there is none.

    Raises:
      ValueError: the folder is a file, or holds something else.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise ValueError(f"{folder}: a file stands where the checkpoints are to be kept")
    found = [path for path in folder.iterdir() if _number(path) is not None]
    others = [path.name for path in folder.iterdir() if not path.name.startswith(_PREFIX)]
    if others and not found:
        raise ValueError(f"{folder}: expected checkpoints of a search, found {others[0]!r}")
    return max(found, key=lambda path: _number(path) or 0, default=None)


def check(path: Path, identity: dict[str, Any]) -> None:
    """Raises a ValueError unless the checkpoint is of this very search."""
    from orbax.checkpoint import v1

    try:
        stored = (v1.metadata(path).custom_metadata or {})[_KEY]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{path}: not a checkpoint of a search") from None
    for name, value in identity.items():
        if stored.get(name) != value:
            raise ValueError(
                f"{path.parent}: these are the checkpoints of another search: {name} was "
                f"{stored.get(name)!r}, is {value!r} now. Name another folder, or remove this one"
            )


def save(
    folder: Path, generation: int, tree: Any, history: dict[str, np.ndarray], identity: Any
) -> None:
    """Writes a checkpoint, whole or not at all, and removes the older ones. Called by all processes.

    Args:
      folder: of all checkpoints, absolute.
      generation: how many generations are done.
      tree: arrays, the same on every device.
      history: float32 [generation] by name.
      identity: what `check` compares.
    """
    from orbax.checkpoint import v1

    path = folder / f"{_PREFIX}{generation:08d}"
    v1.save(
        path,
        {"carry": _leaves(tree), "history": history},
        custom_metadata={_KEY: identity},
        overwrite=True,
    )
    if jax.process_index() == 0:
        for other in folder.iterdir():
            if other.name.startswith(_PREFIX) and other.name != path.name:
                shutil.rmtree(other, ignore_errors=True)


def load(path: Path, like: Any, mesh: Mesh | None) -> tuple[int, Any, dict[str, np.ndarray]]:
    """Reads a checkpoint.

    Args:
      path: of `latest`.
      like: a tree of the structure that was saved.
      mesh: where its arrays go; None: the default device.

    Returns:
      The generations done, the tree, the history.
    """
    from orbax.checkpoint import v1

    where = (
        jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if mesh is None
        else jax.NamedSharding(mesh, jax.P())
    )

    def described(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    stored = v1.metadata(path).metadata
    loaded = v1.load(path, jax.tree.map(described, stored))
    definition = jax.tree.structure(like)
    kinds = jax.tree.leaves(like)
    leaves = [_as(loaded["carry"][_name(i)], kind) for i, kind in enumerate(kinds)]
    history = {name: np.asarray(value) for name, value in loaded["history"].items()}
    return _number(path) or 0, jax.tree.unflatten(definition, leaves), history


def _leaves(tree: Any) -> dict[str, Any]:
    """By number: containers of any kind, keys as their bits."""
    return {
        _name(i): jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)
        for i, leaf in enumerate(jax.tree.leaves(tree))
    }


def _as(array: jax.Array, kind: Any) -> jax.Array:
    if not _is_key(kind):
        return array
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(kind))


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key))


def _name(i: int) -> str:
    return f"{i:04d}"


def _number(path: Path) -> int | None:
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if path.name.startswith(_PREFIX) and digits.isdecimal() else None


def identity_of_key(key: jax.Array) -> list[int]:
    """A key as plain numbers."""
    return np.asarray(jax.random.key_data(key)).astype(int).ravel().tolist()
