"""The config.json of a merged model: that of the donor, with what the merge changed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxmerge.converters import CheckpointError
from jaxmerge.recipes.layers import is_layer_count, role_of
from jaxmerge.recipes.tokenizers import vocabulary_keys

# Lists that tell something of each layer, such as `layer_types`, or which layers are special.
_PER_LAYER = re.compile(r"layer|block|pattern")
_WHICH = re.compile(r"(layers|blocks|idx|idxs|ids|indices|indexes)$")
_SCOPES = {"text": ("text_config", "llm_config", "language_config"), "vision": ("vision_config",)}
_SCOPES["audio"] = ("audio_config",)


class Stacked(NamedTuple):
    """A stack of layers of the output.

    Attributes:
        stack: its path, such as "model.layers".
        layers: how many it has in the donor.
        origins: for each layer of the output a config and the number of the layer there.
    """

    stack: str
    layers: int
    origins: Sequence[tuple[Mapping[str, Any] | None, int]]


def read_config(folder: Path) -> dict[str, Any] | None:
    """Returns a model's `config.json`, if there is one.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return config


def with_layers(config: Mapping[str, Any], stacked: Stacked) -> dict[str, Any]:
    """Returns a config that fits a new number of layers.

    Counts of the stack's layers are replaced wherever they stand, in a nested config for a part of
    the model too. A list of one entry per layer takes for each layer the entry of where it came
    from; a list of layers' numbers names the layers that came from those.

    Args:
        config: the donor's.
        stacked: the stack.

    >>> config = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"], "vocab_size": 9}
    >>> with_layers(config, Stacked("model.layers", 2, [(config, 0), (config, 1), (config, 1)]))
    {'num_hidden_layers': 3, 'layer_types': ['full', 'sliding', 'sliding'], 'vocab_size': 9}
    """
    changed = dict(config)
    scopes = [key for key in _SCOPES.get(role_of(stacked.stack), ()) if key in config]
    for key in scopes:
        if isinstance(config[key], Mapping):
            changed[key] = _restacked(config[key], stacked, key)
    if not scopes or role_of(stacked.stack) == "text":
        changed = {**_restacked(changed, stacked, None)}
    return changed


def with_own_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config for a model whose output head is a tensor of its own.

    >>> with_own_head({"tie_word_embeddings": True})
    {'tie_word_embeddings': False}
    """
    changed = {**config, "tie_word_embeddings": False}
    for key in _SCOPES["text"]:
        if isinstance(config.get(key), Mapping) and "tie_word_embeddings" in config[key]:
            changed[key] = {**config[key], "tie_word_embeddings": False}
    return changed


def with_vocabulary(
    config: Mapping[str, Any], size: int, moved: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a config that fits a new vocabulary.

    Args:
        config: the donor's.
        size: rows of the embeddings.
        moved: entries with ids of tokens that are others now.

    >>> with_vocabulary({"text_config": {"vocab_size": 9}, "bos_token_id": 1}, 12, {"bos_token_id": 0})
    {'text_config': {'vocab_size': 12}, 'bos_token_id': 0}
    """
    changed: dict[str, Any] = {**config, **moved}
    keys = vocabulary_keys(config) or [("vocab_size",)]
    for *scope, key in keys:
        if scope:
            changed[scope[0]] = {**changed[scope[0]], key: size}
        else:
            changed[key] = size
    return changed


def _restacked(config: Mapping[str, Any], stacked: Stacked, scope: str | None) -> dict[str, Any]:
    counts = [key for key in config if is_layer_count(key, config[key])]
    counts = [key for key in counts if config[key] == stacked.layers]
    side = next((s for s in ("decoder", "encoder") if s in stacked.stack.split(".")), None)
    own = [key for key in counts if side is not None and side in key]
    other = "encoder" if side == "decoder" else "decoder"
    changed = dict(config)
    for key in own or [key for key in counts if side is None or other not in key]:
        changed[key] = len(stacked.origins)
    for key, value in config.items():
        if not isinstance(value, list):
            continue
        if len(value) == stacked.layers and _PER_LAYER.search(key):
            changed[key] = [
                _entry(origin, scope, key, layer, value) for origin, layer in stacked.origins
            ]
        elif _WHICH.search(key) and all(
            isinstance(layer, int) and 0 <= layer < stacked.layers for layer in value
        ):
            changed[key] = [
                place
                for place, (origin, layer) in enumerate(stacked.origins)
                if layer in _list(origin, scope, key, value)
            ]
    return changed


def _entry(
    origin: Mapping[str, Any] | None, scope: str | None, key: str, layer: int, donor: list[Any]
) -> Any:
    entries = _list(origin, scope, key, donor)
    return entries[layer] if layer < len(entries) else donor[layer % len(donor)]


def _list(
    origin: Mapping[str, Any] | None, scope: str | None, key: str, donor: list[Any]
) -> list[Any]:
    found = origin or {}
    inner = found.get(scope) if scope is not None else found
    value = inner.get(key) if isinstance(inner, Mapping) else None
    return value if isinstance(value, list) else donor
