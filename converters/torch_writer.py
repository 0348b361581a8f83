"""Writing PyTorch checkpoints."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from jaxmerge.converters import state_dict_key, torch_file
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.partial_file import PartialFile
from jaxmerge.converters.torch_tensors import from_numpy, import_torch


def build(
    path: str,
    tensors: Mapping[str, Any],
    ties: Sequence[tuple[str, ...]],
    template: tuple[str | os.PathLike[str], str | None] | None,
) -> Any:
    """Builds what `torch.save` shall write: a state dict, in which tied names share one storage.

    Args:
      path: the file to be, for messages.
      tensors: name -> NumPy or JAX array.
      ties: groups of names that are one tensor; the first name's values count.
      template: `(source, key)`: a PyTorch file whose other contents are kept, and where in it the
        state dict stands (None: where reading would find it).

    Returns:
      The state dict, or the template's structure with it inside.

    Raises:
      CheckpointError: torch is missing or lacks a dtype, or the template cannot be read.
    """
    torch = import_torch(path)
    first = {name: group[0] for group in ties for name in group}
    made: dict[str, Any] = {}
    for name in tensors:
        source = first.get(name, name)
        if source not in made:
            made[source] = from_numpy(
                torch, np.asarray(tensors[source]), f"{path}: tensor {source!r}"
            )
    state = {name: made[first.get(name, name)] for name in tensors}
    return state if template is None else _filled(torch, template, state)


def write(path: str, structure: Any) -> None:
    """Writes a structure with `torch.save`, under its final name only when it is complete.

    Args:
      path: the file.
      structure: what `build` returned.

    Raises:
      CheckpointError: the disk is full or the system refuses otherwise.
    """
    torch = import_torch(path)
    try:
        with PartialFile(path) as file:
            torch.save(structure, file.path)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its archive writer.
        raise CheckpointError(f"{path}: cannot write: {error}") from error


def _filled(
    torch: ModuleType,
    template: tuple[str | os.PathLike[str], str | None],
    state: Mapping[str, Any],
) -> Any:
    """Returns the template's structure with another state dict in the place of its own."""
    source, key = os.fspath(template[0]), template[1]
    if os.path.isdir(source):
        raise CheckpointError(f"{source}: expected a PyTorch file as template, found a folder")

    def is_tensor(value: object) -> bool:
        return isinstance(value, torch.Tensor)

    structure = torch_file.load(torch, source).structure
    old, path_of_keys = state_dict_key.select(structure, key, is_tensor, source)
    new = _like(torch, old, state, is_tensor)
    if not path_of_keys:
        return new
    holder = structure
    for part in path_of_keys[:-1]:
        holder = holder[part]
    holder[path_of_keys[-1]] = new
    return structure


def _like(
    torch: ModuleType, old: Mapping[str, Any], state: Mapping[str, Any], is_tensor: Any
) -> Any:
    """Keeps the old order, entries that are no tensors, and what hangs on an OrderedDict.

    `Module.state_dict` leaves version numbers in its `_metadata` attribute.
    """
    new: dict[str, Any] = OrderedDict() if isinstance(old, OrderedDict) else {}
    for name, value in old.items():
        if name in state:
            new[name] = state[name]
            if isinstance(value, torch.nn.Parameter):
                new[name] = torch.nn.Parameter(state[name], requires_grad=value.requires_grad)
        elif not is_tensor(value):
            new[name] = value
    new.update({name: tensor for name, tensor in state.items() if name not in new})
    if isinstance(new, OrderedDict):
        new.__dict__.update(getattr(old, "__dict__", {}))
    return new
