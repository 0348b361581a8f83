"""A model's tokenizer as data: its vocabulary and what it says of itself, read from its files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxmerge.converters import CheckpointError
from jaxmerge.recipes.tokenizers import sentencepiece
from jaxmerge.recipes.tokenizers.added_tokens import AddedToken, TokenTable, named

DOCUMENT = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
# Every file that tokenizers of transformers are written to.
FILES = (
    *(DOCUMENT, CONFIG, TEMPLATE, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.json"),
    *("spiece.model", "sentencepiece.bpe.model"),
)
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

# The largest vocabularies have some 260,000 tokens, in 35 MB.
_LARGEST_FILE = 200_000_000
_LARGEST_ID = 1 << 24
_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# What transformers' classes have for tokens that a config does not name: they are added if they are not there.
_END = "<|endoftext|>"
_SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END),
    "GPTNeoXTokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END)
    | {"pad_token": "<|padding|>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    | {"pad_token": "<pad>", "mask_token": "<mask>"},
    "LlamaTokenizer": _SENTENCE,
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END),
    "RobertaTokenizer": _SENTENCE
    | {"sep_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"},
    "BertTokenizer": {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    | {"cls_token": "[CLS]", "mask_token": "[MASK]"},
}
# Models whose tokenizer has one class whatever its config says.
_CLASSES = {"qwen2": "Qwen2Tokenizer"}


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as its files describe it.

    Attributes:
        folder: where its files are.
        document: `tokenizer.json`; None where there is none.
        config: `tokenizer_config.json`, empty where there is none.
        table: its tokens, as transformers has them once it is loaded.
    """

    folder: str
    document: Mapping[str, Any] | None
    config: Mapping[str, Any]
    table: TokenTable

    def added(self, tokens: list[AddedToken]) -> Tokenizer:
        """Returns the tokenizer with more tokens."""
        table = self.table.copy()
        table.add(tokens)
        return replace(self, table=table)


def read_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer's files: `tokenizer.json`, or a vocabulary of the older formats.

    Args:
        folder: the model's folder.

    Raises:
        CheckpointError: no tokenizer there, or a broken or hostile file.
    """
    folder = os.fspath(folder)
    config = read_json(folder, CONFIG) or {}
    document = read_json(folder, DOCUMENT)
    if document is not None:
        where = os.path.join(folder, DOCUMENT)
        own = _own(document.get("model"), where)
        listed = document.get("added_tokens") or []
        if not isinstance(listed, list):
            raise CheckpointError(f"{where}: 'added_tokens': expected a list")
        tokens = [named(token, where) for token in listed]
    else:
        own, listed, tokens = _legacy(folder), [], []
    table = TokenTable(own)
    table.add(tokens)
    table.add(_declared(folder, config, document, table, listed))
    return Tokenizer(folder, document, config, table)


def without_tokens_from(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """Returns a tokenizer without the tokens that its model has no row for.

    Args:
        tokenizer: the tokenizer.
        size: how many rows the model has.

    Raises:
        CheckpointError: the vocabulary cannot be cut.
    """
    table = tokenizer.table
    surplus = {token for token, place in table.vocabulary().items() if place >= size}
    if not surplus:
        return tokenizer
    if tokenizer.document is None:
        raise CheckpointError(
            f"{tokenizer.folder}: token {min(surplus)!r} lies beyond the model's {size} rows; only a "
            f"{DOCUMENT} can be cut to them"
        )
    model = dict(tokenizer.document["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][:size]
    else:
        model["vocab"] = {t: place for t, place in model["vocab"].items() if t not in surplus}
    if isinstance(model.get("merges"), list):
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, surplus)]
    kept = TokenTable({t: place for t, place in table.own.items() if t not in surplus})
    kept.add([token for place, token in sorted(table.added.items()) if place < size])
    return replace(tokenizer, document={**tokenizer.document, "model": model}, table=kept)


def read_json(folder: str, name: str) -> dict[str, Any] | None:
    """Reads a JSON file that holds a mapping.

    Args:
        folder: where it is.
        name: the file.

    Returns:
        The mapping, or None where there is no such file.

    Raises:
        CheckpointError: it cannot be read, is too large, or holds something else.
    """
    text = read_text(folder, name)
    if text is None:
        return None
    path = os.path.join(folder, name)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a mapping, found {type(data).__name__}")
    return data


def read_text(folder: str, name: str) -> str | None:
    """Reads a text file, or returns None where there is none.

    Raises:
        CheckpointError: it cannot be read, is too large, or is no UTF-8 text.
    """
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return None
    try:
        if os.path.getsize(path) > _LARGEST_FILE:
            raise CheckpointError(f"{path}: {os.path.getsize(path)} bytes are too many")
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _own(model: object, where: str) -> dict[str, int]:
    """Returns the vocabulary of a tokenizer's model: of BPE, WordPiece and WordLevel, or Unigram."""
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list):
        pieces = [piece[0] if isinstance(piece, list) and piece else piece for piece in vocabulary]
        if not all(isinstance(piece, str) for piece in pieces):
            raise CheckpointError(f"{where}: 'vocab': expected tokens with their scores")
        vocabulary = {piece: place for place, piece in enumerate(pieces)}
    if not isinstance(vocabulary, dict):
        raise CheckpointError(f"{where}: expected a model with a 'vocab'")
    _check_ids(vocabulary, where)
    return vocabulary


def _check_ids(vocabulary: Mapping[str, object], where: str) -> None:
    seen: set[int] = set()
    for token, place in vocabulary.items():
        if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < _LARGEST_ID:
            raise CheckpointError(f"{where}: token {token!r:.80} has id {place!r:.40}")
        if place in seen:
            raise CheckpointError(f"{where}: id {place} belongs to {token!r:.80} and another token")
        seen.add(place)


def _makes(merge: object, surplus: set[str]) -> bool:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise CheckpointError(f"{DOCUMENT}: expected merges of two tokens, found {merge!r:.80}")
    return "".join(parts) in surplus or any(part in surplus for part in parts)


def _legacy(folder: str) -> dict[str, int]:
    vocabulary = read_json(folder, "vocab.json")
    if vocabulary is not None:
        _check_ids(vocabulary, os.path.join(folder, "vocab.json"))
        return vocabulary
    lines = read_text(folder, "vocab.txt")
    if lines is not None:
        return {
            token.rstrip("\r"): place for place, token in enumerate(lines.rstrip("\n").split("\n"))
        }
    for name in _SENTENCEPIECE:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            if os.path.getsize(path) > _LARGEST_FILE:
                raise CheckpointError(f"{path}: {os.path.getsize(path)} bytes are too many")
            return {piece: i for i, piece in enumerate(sentencepiece.pieces(path))}
    raise CheckpointError(
        f"{folder}: no tokenizer: expected {DOCUMENT}, vocab.json, vocab.txt or {_SENTENCEPIECE[0]}"
    )


def _declared(
    folder: str,
    config: Mapping[str, Any],
    document: Mapping[str, Any] | None,
    table: TokenTable,
    listed: list[dict[str, Any]],
) -> Iterator[AddedToken]:
    """Yields what transformers adds when it loads the tokenizer: added and special tokens."""
    where = os.path.join(folder, CONFIG)
    given = {**_defaults(folder, config, document), **config}
    decoder: dict[int, AddedToken] = {}
    if isinstance(config.get("added_tokens_decoder"), dict):
        for place, token in config["added_tokens_decoder"].items():
            decoder[_id(place, where)] = named(token, where)
    else:
        given |= read_json(folder, "special_tokens_map.json") or {}
        special = {_content(given.get(key)) for key in _SPECIAL}
        beside = os.path.join(folder, "added_tokens.json")
        for token, place in (read_json(folder, "added_tokens.json") or {}).items():
            decoder[_id(place, beside)] = named(token, beside, special=token in special)
        for token in listed:
            decoder[_id(token.get("id"), os.path.join(folder, DOCUMENT))] = named(token, where)
    attributes = {_content(value) for value in _attributes(given)}
    for _, token in sorted(decoder.items()):
        yield replace(token, special=token.special or token.content in attributes)
    known = {token.content for token in decoder.values()}
    extra = given.get("extra_special_tokens") or given.get("additional_special_tokens") or []
    others = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    for value in (*_attributes(given), *others):
        content = _content(value)
        # Those that the tokenizer has keep the settings that they have there.
        if content is not None and content not in known | {t.content for t in table.added.values()}:
            known.add(content)
            yield named(value, where, special=True)


def _defaults(
    folder: str, config: Mapping[str, Any], document: Mapping[str, Any] | None
) -> Mapping[str, str]:
    model = (read_json(folder, "config.json") or {}).get("model_type")
    named_class = str(config.get("tokenizer_class")).removesuffix("Fast")
    pipeline = [(document or {}).get(part) for part in ("pre_tokenizer", "decoder")]
    # Tokenizers of Llama 3 bear the name of the class of Llama 2, which then is not used.
    if named_class == "LlamaTokenizer" and "'ByteLevel'" in repr(pipeline):
        named_class = ""
    return _DEFAULTS.get(_CLASSES.get(str(model), named_class), {})


def _attributes(config: Mapping[str, Any]) -> list[object]:
    """Returns the tokens that have a name: `eos_token` and the others, a model's own last."""
    own = [key for key in config if key.endswith("_token") and key not in _SPECIAL]
    return [config[key] for key in (*_SPECIAL, *own) if _content(config.get(key)) is not None]


def _content(value: object) -> str | None:
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else None


def _id(place: object, where: str) -> int:
    number = (
        int(place) if isinstance(place, str) and place.isdecimal() and len(place) < 10 else place
    )
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < _LARGEST_ID:
        raise CheckpointError(f"{where}: an added token has id {place!r:.40}")
    return number
