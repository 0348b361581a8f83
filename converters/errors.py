"""The one error of this package, and the nearest-name hint that its messages carry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written as asked; the message names file, tensor and cause."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a sentence naming the known name closest to `name`, or an empty string.

    Args:
      name: the name that was not found.
      known: the names that exist.

    Returns:
      Text that starts with a space, so that it can be appended to a message.

    Example:
      >>> nearest("fc1.wieght", ["fc1.weight", "fc1.bias"])
      " Nearest: 'fc1.weight'."
      >>> nearest("x", ["fc1.weight"])
      ''
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Nearest: {close[0]!r}." if close else ""
