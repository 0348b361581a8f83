"""The front door for reading: any checkpoint path to tensors."""

from __future__ import annotations

import os

import numpy as np

from jaxmerge.converters import folder
from jaxmerge.converters.errors import CheckpointError
from jaxmerge.converters.gguf_reader import GgufCheckpoint
from jaxmerge.converters.reader import Checkpoint
from jaxmerge.converters.safetensors_reader import SafetensorsCheckpoint
from jaxmerge.converters.torch_reader import TorchCheckpoint


def open_checkpoint(path: str | os.PathLike[str], *, key: str | None = None) -> Checkpoint:
    """Opens a checkpoint without reading its tensors.

    Args:
      path: a file (`.safetensors`, `.gguf`, `.pt`, `.pth`, `.bin`, `.tar`, `.ckpt`), an index file,
        or a folder with `model.safetensors`, with shards and their index, with `pytorch_model.bin`,
        or with one GGUF file. GGUF tensors are dequantised, in Hugging Face's names and order.
      key: where the state dict stands in a PyTorch file, such as "model.state_dict". Without it
        the file's top level is taken if it holds tensors, else the one state dict inside that
        stands out; `Checkpoint.key` says which.

    Returns:
      The open checkpoint: a context manager.

    Raises:
      CheckpointError: nothing there, a broken or hostile file, no state dict or several, or a
        PyTorch or GGUF file where torch or gguf is not installed.

    Example:
      >>> import os, tempfile
      >>> from jaxmerge.converters import save_checkpoint
      >>> folder = tempfile.mkdtemp()
      >>> save_checkpoint(os.path.join(folder, "m.safetensors"), {"w": np.ones((2, 3))})
      >>> with open_checkpoint(os.path.join(folder, "m.safetensors")) as checkpoint:
      ...     checkpoint.tensors["w"].shape, checkpoint.read("w").sum()
      ((2, 3), np.float64(6.0))
    """
    path = os.fspath(path)
    location = folder.locate(path)
    checkpoint: Checkpoint
    if location.format != "torch" and key is not None:
        raise CheckpointError(
            f"{path}: key {key!r} selects a state dict inside a PyTorch file; {location.format} "
            "files are flat"
        )
    if location.format == "safetensors":
        checkpoint = SafetensorsCheckpoint.open(path, location.files)
    elif location.format == "gguf":
        checkpoint = GgufCheckpoint.open(path, location.files)
    else:
        checkpoint = TorchCheckpoint.open(path, location.files, key)
    try:
        _check_index(checkpoint, location.weight_map)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def load_checkpoint(
    path: str | os.PathLike[str], *, key: str | None = None
) -> dict[str, np.ndarray]:
    """Reads a whole checkpoint.

    Args:
      path: as for `open_checkpoint`.
      key: as for `open_checkpoint`.

    Returns:
      name -> array of the stored shape and dtype, in the file's order. Tied names have the same
      array object.

    Raises:
      CheckpointError: as for `open_checkpoint`, or names recorded as tied hold different values.

    Example:
      >>> import os, tempfile
      >>> from jaxmerge.converters import save_checkpoint
      >>> path, w = os.path.join(tempfile.mkdtemp(), "m.safetensors"), np.ones(2)
      >>> save_checkpoint(path, {"embed.weight": w, "head.weight": w})
      >>> tensors = load_checkpoint(path)
      >>> tensors["embed.weight"] is tensors["head.weight"]
      True
    """
    with open_checkpoint(path, key=key) as checkpoint:
        read = {name: checkpoint.read(name) for name in _untied(checkpoint)}
        for first, *others in checkpoint.ties:
            for name in others:
                _check_same(checkpoint, read[first], first, name)
                read[name] = read[first]
        return {name: read[name] for name in checkpoint.tensors}


def _untied(checkpoint: Checkpoint) -> list[str]:
    tied = {name for group in checkpoint.ties for name in group[1:]}
    return [name for name in checkpoint.disk_order() if name not in tied]


def _check_same(checkpoint: Checkpoint, expected: np.ndarray, first: str, name: str) -> None:
    """A record of ties may outlive an edit of the tensors; other formats truly share storage."""
    if checkpoint.format != "safetensors":
        return
    found = checkpoint.read(name)
    if not np.array_equal(expected.reshape(-1).view(np.uint8), found.reshape(-1).view(np.uint8)):
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} is recorded as tied to {first!r} but holds other "
            "values; write the file again without its metadata entry 'jaxmerge.ties'"
        )


def _check_index(checkpoint: Checkpoint, weight_map: dict[str, str] | None) -> None:
    """What the index lists must be where it says; tensors that it does not list are read too."""
    for name, file in (weight_map or {}).items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{checkpoint.path}: the index lists tensor {name!r} in {file}, which does not "
                "hold it"
            )
        if info.file != file:
            raise CheckpointError(
                f"{checkpoint.path}: the index lists tensor {name!r} in {file}, found it in "
                f"{info.file}"
            )
