"""Which tensors have one row for each token: embeddings, output heads and their biases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxmerge.converters import TensorInfo

_NAMES = "embed_tokens|wte|word_embeddings?|tok_embeddings|embed_in|token_embedding|tokens_embed"
_EMBEDDING = re.compile(rf"(^|\.)({_NAMES}|shared|embeddings?)\.weight$")
# Names that mean a table of tokens wherever they stand, and names that do outside of layers.
_TABLE = re.compile(
    rf"(^|\.)({_NAMES}|lm_head|lm_head\.\w+|embed_out|vocab_projector)(\.(weight|bias))?$"
    # The head of the first Phi models is their last layer.
    r"|^layers\.\d+\.linear\.(weight|bias)$"
)
_OUTER_TABLE = re.compile(
    r"(^|\.)(shared|embeddings?|output|output_layer|decoder|predictions|generator)"
    r"(\.(weight|bias))?$"
)
_OTHER = re.compile(r"pos|wpe|type|segment|norm|ln|rotary|patch|rel")
_LAYER = re.compile(r"(^|\.)\d+\.")


def vocabulary_size(config: Mapping[str, Any] | None) -> int | None:
    """Returns the size of the vocabulary by a `config.json`, nested ones included.

    >>> vocabulary_size({"text_config": {"vocab_size": 32000}})
    32000
    """
    for key in vocabulary_keys(config or {}):
        value: Any = config
        for part in key:
            value = value[part]
        return int(value)
    return None


def vocabulary_keys(config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the paths of `vocab_size` in a config, the one that counts first."""
    paths: list[tuple[str, ...]] = []
    for prefix in ((), ("text_config",), ("llm_config",), ("language_config",)):
        part: Any = config
        for key in prefix:
            part = part.get(key) if isinstance(part, Mapping) else None
        size = part.get("vocab_size") if isinstance(part, Mapping) else None
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            paths.append((*prefix, "vocab_size"))
    return paths


def embedding_rows(tensors: Mapping[str, TensorInfo], size: int | None) -> int | None:
    """Returns how many rows a model's embedding has.

    Args:
        tensors: the model's.
        size: of its vocabulary by its config, if that says so.

    Returns:
        The rows; where no tensor is known for an embedding, `size`.
    """
    rows = [
        info.shape[0]
        for name, info in tensors.items()
        if _EMBEDDING.search(name) and len(info.shape) == 2
    ]
    if size in rows or not rows:
        return size
    return rows[0]


def is_named_table(name: str) -> bool:
    """Whether a tensor's name says that it has a row for each token.

    >>> is_named_table("lm_head.bias"), is_named_table("model.norm.weight")
    (True, False)
    """
    return bool(_TABLE.search(name) or (_OUTER_TABLE.search(name) and not _LAYER.search(name)))


def may_be_table(name: str) -> bool:
    """Whether a tensor's name does not contradict that it has a row for each token.

    >>> may_be_table("readout.weight"), may_be_table("transformer.wpe.weight")
    (True, False)
    """
    return is_named_table(name) or not (_LAYER.search(name) or _OTHER.search(name))
