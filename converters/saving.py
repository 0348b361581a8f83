"""The front door for writing: a flat dict of arrays to a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmerge.converters import folder, torch_writer
from jaxmerge.converters import ties as tying
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.tensor_info import TensorInfo
from jaxmerge.converters.writer import CheckpointWriter


def save_checkpoint(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    format: str | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_size: int | None = None,
    ties: Sequence[Sequence[str]] | None = None,
    template: tuple[str | os.PathLike[str], str | None] | None = None,
) -> None:
    """Writes a checkpoint; the final names appear only when it is complete.

    Args:
      path: a file (`.safetensors`; `.pt`, `.pth`, `.bin`, `.tar`, `.ckpt` for PyTorch), or a folder
        (made if need be), which gets `model.safetensors` or shards and an index.
      tensors: name -> NumPy or JAX array. The order is kept.
      format: "safetensors" or "torch"; None: from the suffix, a folder being safetensors. A folder
        with format "torch" gets `pytorch_model.bin`.
      metadata: text entries, safetensors only. transformers wants {"format": "pt"} among them.
      shard_size: for a safetensors folder, the most bytes of tensors in one file.
      ties: groups of names that are one tensor; None: the names that share one array. They share
        storage in a PyTorch file; a safetensors file has their bytes under each name and records
        the groups in its metadata.
      template: for PyTorch files, `(source, key)`: everything else that the source file holds
        beside the state dict at `key` (as `Checkpoint.key` gives it) is written too, so that the
        result loads wherever the source does.

    Raises:
      CheckpointError: not a flat dict of arrays, a dtype that the format lacks, options that do
        not fit the format, a full disk, or a folder with weights that would not be replaced.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> out = tempfile.mkdtemp()
      >>> save_checkpoint(out, {"w": np.ones(4, np.float32)}, metadata={"format": "pt"})
      >>> os.listdir(out)
      ['model.safetensors']
    """
    path = os.fspath(path)
    infos = [_info(path, name, array) for name, array in tensors.items()]
    groups = tying.find_ties(tensors) if ties is None else [tuple(group) for group in ties]
    if _format(path, format) == "safetensors":
        if template is not None:
            raise CheckpointError(f"{path}: a template needs a PyTorch file, found safetensors")
        with CheckpointWriter(
            path, infos, metadata=metadata, shard_size=shard_size, ties=groups
        ) as writer:
            for name, array in tensors.items():
                writer.write(name, array)
        return
    if metadata:
        raise CheckpointError(
            f"{path}: PyTorch files have no metadata, found entries {sorted(metadata)}"
        )
    if shard_size is not None:
        raise CheckpointError(f"{path}: PyTorch files are not written in shards; use safetensors")
    checked = tying.check_ties(groups, {info.name: info for info in infos}, path)
    file = _torch_file(path)
    structure = torch_writer.build(file, tensors, checked, template)
    if file != path:
        os.makedirs(path, exist_ok=True)
    torch_writer.write(file, structure)


def _format(path: str, wanted: str | None) -> str:
    if wanted not in (None, "safetensors", "torch"):
        raise CheckpointError(f"{path}: expected format 'safetensors' or 'torch', found {wanted!r}")
    if path.endswith(folder.SAFETENSORS_SUFFIX) and not os.path.isdir(path):
        named = "safetensors"
    elif path.endswith(folder.TORCH_SUFFIXES) and not os.path.isdir(path):
        named = "torch"
    else:
        return wanted or "safetensors"
    if wanted not in (None, named):
        raise CheckpointError(f"{path}: format {wanted!r} does not fit the file's name")
    return named


def _torch_file(path: str) -> str:
    if path.endswith(folder.TORCH_SUFFIXES) and not os.path.isdir(path):
        return path
    present = folder.weight_files(path) if os.path.isdir(path) else []
    left = [name for name in present if name != folder.TORCH_NAME]
    if left:
        raise CheckpointError(
            f"{path}: the folder already has weights: {', '.join(left[:5])}; remove them or choose "
            "another folder"
        )
    return os.path.join(path, folder.TORCH_NAME)


def _info(path: str, name: str, array: Any) -> TensorInfo:
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: expected names of text, found {name!r}")
    if isinstance(array, Mapping):
        raise CheckpointError(
            f"{path}: {name!r}: expected a flat dict of arrays, found a nested one"
        )
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if shape is None or dtype is None:
        raise CheckpointError(f"{path}: {name!r}: expected an array, found {type(array).__name__}")
    try:
        return TensorInfo.of(name, tuple(shape), dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: tensor {name!r}: {error}") from None
