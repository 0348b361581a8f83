"""How a recipe or a command line names a state dict inside a file."""

from __future__ import annotations

import os

from jaxmerge.converters.errors import CheckpointError


def split_key(address: str) -> tuple[str, str | None]:
    """Splits `path#key` into a path and the key of a nested state dict.

    A file or folder whose own name has a `#` wins over a key.

    Args:
      address: a path, or a path, `#` and a key with dots, as in `x.pth#model.state_dict`.

    Returns:
      The path and the key, None if there is none.

    Raises:
      CheckpointError: the key is empty.

    Example:
      >>> split_key("x.pth#model.state_dict")
      ('x.pth', 'model.state_dict')
      >>> split_key("x.pth")
      ('x.pth', None)
    """
    if "#" not in address or os.path.exists(address):
        return address, None
    cuts = [index for index, letter in enumerate(address) if letter == "#"]
    # A path that exists decides where the key starts; the longest one, as for whole addresses.
    cut = next((cut for cut in reversed(cuts) if os.path.exists(address[:cut])), cuts[0])
    path, key = address[:cut], address[cut + 1 :]
    if not key:
        raise CheckpointError(f"{address}: expected a key such as model.state_dict after '#'")
    return path, key
