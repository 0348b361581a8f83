"""Which layer a tensor belongs to, and how deep that layer lies, from the tensor's name."""

import re
from collections.abc import Iterable

_PARTS = re.compile(r"[/.]")
_NUMBER = re.compile(r"^(.*_)?(\d+)$")
_ENDS_IN_NUMBER = re.compile(r"^(.*?)(\d+)$")
_AT_THE_INPUT = re.compile(
    r"emb|wte|wpe|patch|stem|pos|cls|class_token|ln_pre|pre_?norm|input|conv_?1|bn_?1|conv_?0"
)
_ORDER = {"encoder": "0", "decoder": "1"}

Key = tuple[tuple[str, int], ...]


def layer_of(name: str) -> str | None:
    """The leading part of a tensor's name that names its layer, or None where it names none.

    That is all up to the first component that is a number ("layers.3"), or ends in one after an underscore as Flax
    writes it ("layers_3").

    Example:
      >>> layer_of("encoder.layer.3.output.dense.weight"), layer_of("blocks_0/mlp/fc1/kernel"), layer_of("embed")
      ('encoder.layer.3', 'blocks_0', None)
    """
    end = _end(name, _NUMBER)
    return None if end is None else name[:end]


def depths(names: Iterable[str]) -> dict[str, float]:
    """How deep each tensor lies in its model: 0 in the first layer, 1 in the last.

    Layers follow their numbers ("layer1.1" before "layer2.0", an encoder's before a decoder's). A tensor outside of all
    layers lies at 0 where its name speaks of the input (embedding, stem, patch, position, first convolution), else at
    1. A model none of whose names has a numbered component is ordered by the numbers that components end in ("fc1",
    "fc2"); one of a single layer lies at 0.

    Args:
      names: all tensors of a model, as checkpoints name them.

    Returns:
      Depths in [0, 1] by name.

    Example:
      >>> depths(["embed", "layers.0.w", "layers.1.w", "layers.10.w", "head"])
      {'embed': 0.0, 'layers.0.w': 0.0, 'layers.1.w': 0.5, 'layers.10.w': 1.0, 'head': 1.0}
    """
    names = list(names)
    keys = {name: _key(name, _NUMBER) for name in names}
    if not any(keys.values()):
        keys = {name: _key(name, _ENDS_IN_NUMBER) for name in names}
    layers = sorted({key for key in keys.values() if key is not None})
    place = {key: i / max(len(layers) - 1, 1) for i, key in enumerate(layers)}

    def outside(name: str) -> float:
        return 0.0 if not layers or _AT_THE_INPUT.search(name.lower()) else 1.0

    return {name: outside(name) if (key := keys[name]) is None else place[key] for name in names}


def _end(name: str, number: re.Pattern[str]) -> int | None:
    start = 0
    for part in _PARTS.split(name):
        if number.match(part):
            return start + len(part)
        start += len(part) + 1
    return None


def _key(name: str, number: re.Pattern[str]) -> Key | None:
    end = _end(name, number)
    if end is None:
        return None
    key = []
    for part in _PARTS.split(name[:end]):
        found = _ENDS_IN_NUMBER.match(part)
        text, digits = found.groups() if found else (part, "-1")
        key.append((_ORDER.get(text, text), int(digits)))
    return tuple(key)
