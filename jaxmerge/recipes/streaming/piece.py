"""What a streamed merge gives."""

from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """A run of elements of one tensor of the output.

    Attributes:
      name: the tensor's name.
      start: flat index of the first element.
      values: [elements], of the output's dtype; may be a view of memory that is not to be written to.
      last: whether the tensor ends with it.
    """

    name: str
    start: int
    values: np.ndarray
    last: bool
