"""What a header says about one tensor."""

from __future__ import annotations

import math
from typing import NamedTuple

from numpy.typing import DTypeLike

from jaxmerge.converters import dtypes


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint, as known without reading it.

    Attributes:
      name: the tensor's name in the checkpoint, such as "fc1.weight".
      shape: its dimensions; `()` for a scalar.
      dtype: NumPy or ml_dtypes name: "float32", "bfloat16", "float8_e4m3fn", "bool", ...
      nbytes: its size in bytes.
      file: the file that holds it; empty for a tensor that is yet to be written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: str = ""

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], dtype: DTypeLike, file: str = "") -> TensorInfo:
        """Builds an info, with the dtype's name and the size worked out.

        Args:
          name: the tensor's name.
          shape: its dimensions.
          dtype: its NumPy or ml_dtypes dtype, or the name of one.
          file: the file that holds it, if any.

        Returns:
          The info.

        Raises:
          CheckpointError: no checkpoint can hold the dtype.

        Example:
          >>> TensorInfo.of("w", (2, 3), "bfloat16").nbytes
          12
        """
        stored = dtypes.storage_dtype(dtype)
        shape = tuple(int(size) for size in shape)
        return cls(name, shape, dtypes.name_of(stored), math.prod(shape) * stored.itemsize, file)
