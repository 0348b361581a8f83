"""Sizes in bytes as people write them."""

import re

import typer

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def size(text: str) -> int:
    """Reads a size: a whole number of bytes, or a number with a unit.

    Raises:
        typer.BadParameter: not a size.

    >>> size("5GB"), size("1.5 MiB"), size("300")
    (5000000000, 1572864, 300)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    unit = None if match is None else {**_UNITS, **_BINARY}.get(match[2])
    if match is None or unit is None:
        raise typer.BadParameter(f"expected a size such as 5GB, 500MB or 2GiB, found {text!r}")
    return int(float(match[1]) * unit)
