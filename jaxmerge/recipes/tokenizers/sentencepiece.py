"""The pieces of a SentencePiece model, out of its protocol buffer."""

from __future__ import annotations

from jaxmerge.converters import CheckpointError

# Field 1 of the model: a piece; field 1 of a piece: its text.
_FIELD = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def pieces(path: str) -> list[str]:
    """Reads the pieces of a `tokenizer.model`, in the order of their ids.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is no SentencePiece model.
    """
    with open(path, "rb") as file:
        data = memoryview(file.read())
    found = []
    try:
        for piece in _fields(data):
            (text,) = _fields(piece)
            found.append(bytes(text).decode("utf-8"))
    except (ValueError, IndexError):
        raise CheckpointError(f"{path}: not a SentencePiece model") from None
    if not found:
        raise CheckpointError(f"{path}: not a SentencePiece model: it has no pieces")
    return found


def _fields(data: memoryview) -> list[memoryview]:
    """Returns the values of field 1 of a message."""
    found = []
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, place = _varint(data, place)
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
        elif kind == _BYTES:
            size, place = _varint(data, place)
            if number == _FIELD:
                found.append(data[place : place + size])
            place += size
        else:
            raise ValueError(f"wire type {kind}")
        if place > len(data):
            raise ValueError("the message ends early")
    return found


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
