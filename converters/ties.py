"""Tied tensors: finding them, and recording them where a format cannot share storage."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.tensor_info import TensorInfo

# Safetensors gives every name bytes of its own; this metadata entry says which names are one.
METADATA_KEY = "jaxmerge.ties"


def find_ties(tensors: Mapping[str, object]) -> list[tuple[str, ...]]:
    """Groups the names that hold one array: the same object, or one piece of NumPy memory.

    Views that only overlap, or that read one memory by another shape, strides or dtype, are not
    ties; nor are empty arrays.

    Args:
      tensors: name -> array of any kind.

    Returns:
      Groups of at least two names, in the mapping's order.

    Example:
      >>> w = np.ones(3)
      >>> find_ties({"a": w, "b": w, "c": w.copy(), "d": w[:2]})
      [('a', 'b')]
    """
    return group_by({name: _identity(array) for name, array in tensors.items()})


def group_by(identities: Mapping[str, Hashable | None]) -> list[tuple[str, ...]]:
    """Groups the names that have one identity; None stands for a tensor that is never tied.

    Args:
      identities: name -> identity.

    Returns:
      Groups of at least two names, in the mapping's order.

    Example:
      >>> group_by({"a": 1, "b": 2, "c": 1, "d": None, "e": None})
      [('a', 'c')]
    """
    groups: dict[Hashable, list[str]] = {}
    for name, identity in identities.items():
        if identity is not None:
            groups.setdefault(identity, []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def check_ties(
    ties: Iterable[Sequence[str]], tensors: Mapping[str, TensorInfo], where: str
) -> list[tuple[str, ...]]:
    """Checks that tied names exist, stand in one group only and agree in shape and dtype.

    Args:
      ties: groups of names.
      tensors: name -> info.
      where: the file or folder, for the message.

    Returns:
      The groups as tuples.

    Raises:
      CheckpointError: a group is not possible.
    """
    checked: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for group in ties:
        for name in group:
            if name not in tensors:
                raise CheckpointError(f"{where}: tied tensor {name!r} is not in the checkpoint")
            if name in seen:
                raise CheckpointError(f"{where}: tensor {name!r} is tied twice")
            seen.add(name)
            first, other = tensors[group[0]], tensors[name]
            if (first.shape, first.dtype) != (other.shape, other.dtype):
                raise CheckpointError(
                    f"{where}: tensor {name!r} is tied to {first.name!r}: expected "
                    f"{first.dtype}{list(first.shape)}, found {other.dtype}{list(other.shape)}"
                )
        if len(group) > 1:
            checked.append(tuple(group))
    return checked


def record(metadata: Mapping[str, str], ties: Sequence[tuple[str, ...]]) -> dict[str, str]:
    """Returns the metadata to write, with the ties in it.

    transformers refuses metadata without a `format`, so one is added where the ties would be the
    only entry; `recorded` takes it out again.

    Args:
      metadata: the user's entries.
      ties: groups of names; with none the metadata stay as they are.

    Returns:
      The entries to write.
    """
    if not ties:
        return dict(metadata)
    entry = json.dumps({"groups": [list(group) for group in ties], "alone": not metadata})
    return {**(metadata or {"format": "pt"}), METADATA_KEY: entry}


def recorded(metadata: Mapping[str, str], where: str) -> tuple[dict[str, str], list[list[str]]]:
    """Splits metadata into the user's entries and the ties: the inverse of `record`.

    Args:
      metadata: the entries of a safetensors file.
      where: the file, for the message.

    Returns:
      The user's entries and the groups of names.

    Raises:
      CheckpointError: the entry is not what `record` writes.
    """
    own = dict(metadata)
    entry = own.pop(METADATA_KEY, None)
    if entry is None:
        return own, []
    try:
        parsed = json.loads(entry)
        groups, alone = parsed["groups"], parsed["alone"]
    except (ValueError, TypeError, KeyError, RecursionError):
        groups, alone = None, False
    if not isinstance(groups, list) or not all(
        isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups
    ):
        raise CheckpointError(
            f"{where}: metadata entry {METADATA_KEY!r}: expected "
            f'{{"groups": [[name, ...], ...], "alone": false}}; found {entry[:80]!r}'
        )
    return {} if alone is True else own, groups


def _identity(array: object) -> Hashable | None:
    if isinstance(array, np.ndarray):
        if array.size == 0:
            return None
        pointer = array.__array_interface__["data"][0]
        return (pointer, array.shape, array.strides, array.dtype)
    return None if getattr(array, "size", 1) == 0 else ("object", id(array))
