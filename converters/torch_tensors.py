"""Torch tensors to NumPy arrays and back, bit for bit. Torch is imported by whoever calls."""

from __future__ import annotations

from collections.abc import Hashable
from types import ModuleType
from typing import Any

import numpy as np

from jaxmerge.converters import byte_io, dtypes
from jaxmerge.converters.errors import CheckpointError


def import_torch(path: str) -> ModuleType:
    """Imports torch, the only place where that happens.

    Args:
      path: the file that needs it, for the message.

    Returns:
      The module.

    Raises:
      CheckpointError: torch is not installed; the message names the extra.
    """
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: PyTorch files need torch, which is not installed: "
            "pip install 'jaxmerge[torch]'"
        ) from None
    return torch


def dtype_of(torch: ModuleType, tensor: Any, where: str) -> np.dtype:
    """Checks that a tensor is a plain, dense one and returns its NumPy dtype.

    Args:
      torch: the module.
      tensor: a torch tensor.
      where: file and tensor, for the message.

    Returns:
      The NumPy or ml_dtypes dtype with the same bits.

    Raises:
      CheckpointError: a quantised, sparse, nested or meta tensor, or a dtype without a NumPy one.
    """
    if tensor.is_quantized:
        raise CheckpointError(
            f"{where}: a quantised tensor ({tensor.dtype}); dequantise the model first or use the "
            "original checkpoint"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise CheckpointError(
            f"{where}: expected a dense tensor, found {tensor.layout}; convert it with to_dense()"
        )
    if tensor.device.type != "cpu":
        raise CheckpointError(
            f"{where}: expected a tensor with values, found one on the {tensor.device.type} device"
        )
    try:
        return dtypes.storage_dtype(str(tensor.dtype).removeprefix("torch."))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None


def to_numpy(torch: ModuleType, tensor: Any, dtype: np.dtype) -> np.ndarray:
    """Copies a dense CPU tensor to a new array with the same bits.

    Args:
      torch: the module.
      tensor: a tensor that `dtype_of` accepts.
      dtype: what `dtype_of` returned.

    Returns:
      A C-contiguous array of the tensor's shape.
    """
    array = np.empty(tuple(tensor.shape), dtype)
    if array.size == 0:
        return array
    tensor = tensor.detach()
    target = torch.from_numpy(array.reshape(-1).view(np.uint8))
    if tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        # One plain copy; torch would share it out to threads, which costs more than it saves.
        target.numpy()[:] = tensor.reshape(-1).view(torch.uint8).numpy()
    else:
        target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return array


def from_numpy(torch: ModuleType, array: np.ndarray, where: str) -> Any:
    """Copies an array to a new tensor with the same bits, in a storage of its own.

    Args:
      torch: the module.
      array: a NumPy array of any layout.
      where: file and tensor, for the message.

    Returns:
      A contiguous CPU tensor.

    Raises:
      CheckpointError: this torch has no such dtype.
    """
    dtype = dtypes.storage_dtype(array.dtype)
    target = getattr(torch, dtype.name, None)
    if not isinstance(target, torch.dtype):
        raise CheckpointError(f"{where}: torch {torch.__version__} has no dtype {dtype.name}")
    tensor = torch.empty(array.shape, dtype=target)
    if array.size:
        flat = tensor.view(-1).view(torch.uint8).numpy()
        flat[:] = byte_io.as_bytes(np.ascontiguousarray(array, dtype))
    return tensor


def identity(tensor: Any) -> Hashable | None:
    """Returns what two tensors have in common exactly if they are one: memory and its layout.

    Args:
      tensor: a dense CPU tensor.

    Returns:
      Something hashable, or None for an empty tensor, which shares nothing.
    """
    if tensor.numel() == 0:
        return None
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
