"""The storage types of checkpoints: safetensors codes and NumPy / ml_dtypes types."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from jaxmerge.converters.errors import CheckpointError

_BY_CODE: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
}
_CODES: dict[np.dtype, str] = {dtype: code for code, dtype in _BY_CODE.items()}
_BY_NAME: dict[str, np.dtype] = {dtype.name: dtype for dtype in _CODES}
# NumPy works a dtype's name out anew each time, which counts over 100,000 tensors.
_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in _BY_NAME.items()}
# Several values in one byte: only quantised checkpoints hold these.
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")


def names() -> tuple[str, ...]:
    """Returns the NumPy / ml_dtypes names of every storage type, "bfloat16" and so on."""
    return tuple(_BY_NAME)


def name_of(dtype: np.dtype) -> str:
    """Returns the name of a storage dtype.

    Args:
      dtype: as `from_code` or `storage_dtype` returns it.

    Example:
      >>> name_of(from_code("BF16"))
      'bfloat16'
    """
    return _NAMES[dtype]


def from_code(code: str) -> np.dtype:
    """Returns the NumPy dtype of a safetensors code.

    Args:
      code: a code from a safetensors header, such as "BF16".

    Returns:
      The dtype.

    Raises:
      CheckpointError: the code is unknown or packs several values into a byte.

    Example:
      >>> from_code("BF16").name
      'bfloat16'
    """
    dtype = _BY_CODE.get(code)
    if dtype is not None:
        return dtype
    if code in _PACKED:
        raise CheckpointError(
            f"dtype {code!r} packs several values into one byte: a quantised tensor. "
            "Dequantise the checkpoint first or use the original one"
        )
    raise CheckpointError(f"expected a dtype out of {', '.join(_BY_CODE)}; found {code!r}")


def to_code(dtype: DTypeLike) -> str:
    """Returns the safetensors code of a dtype (of its name, or of any byte order).

    Args:
      dtype: a NumPy or ml_dtypes dtype, or the name of one.

    Returns:
      The code, such as "F32".

    Raises:
      CheckpointError: safetensors cannot hold the dtype.

    Example:
      >>> to_code("bfloat16"), to_code(">f4")
      ('BF16', 'F32')
    """
    return _CODES[storage_dtype(dtype)]


def storage_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the native storage dtype for a dtype or its name.

    Args:
      dtype: a NumPy or ml_dtypes dtype, or the name of one; byte order is ignored.

    Returns:
      The dtype in native byte order.

    Raises:
      CheckpointError: no checkpoint can hold the dtype.

    Example:
      >>> storage_dtype("float8_e4m3fn").itemsize
      1
    """
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None)
    known = _BY_NAME.get(name) if isinstance(name, str) else None
    if known is not None:
        return known
    try:
        return _BY_NAME[np.dtype(dtype).name]
    except (TypeError, KeyError):
        raise CheckpointError(
            f"expected a dtype out of {', '.join(_BY_NAME)}; found {dtype!s}"
        ) from None


def is_floating(name: str) -> bool:
    """Says whether a storage type, by its name, holds floating-point numbers.

    Example:
      >>> is_floating("bfloat16"), is_floating("int8")
      (True, False)
    """
    return name.startswith(("float", "bfloat"))


def floating_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the native storage dtype for a floating-point dtype or its name.

    Args:
      dtype: a NumPy or ml_dtypes dtype, or the name of one.

    Returns:
      The dtype.

    Raises:
      CheckpointError: it is not a floating-point dtype that a checkpoint can hold.
    """
    found = storage_dtype(dtype)
    if not is_floating(found.name):
        raise CheckpointError(f"expected a floating-point dtype, found {found.name}")
    return found
