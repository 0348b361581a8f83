"""The tokenizer files that a GGUF file's metadata stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# Before a byte-level BPE text is cut: as these regular expressions say, then at GPT-2's own where the flag is set.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ONE_DIGIT = (_CONTRACTIONS + _WORDS).replace("DIGITS", r"\p{N}")
_THREE_DIGITS = (_CONTRACTIONS + _WORDS).replace("DIGITS", r"\p{N}{1,3}")
_CUTS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "gpt-2": (None, True),
    "smollm": ({"type": "Digits", "individual_digits": True}, True),
    "qwen2": ({"type": "Split", "pattern": {"Regex": _ONE_DIGIT}}, False),
    "llama-bpe": ({"type": "Split", "pattern": {"Regex": _THREE_DIGITS}}, False),
}
_CONTROL, _USER_DEFINED = 3, 4
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_files(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Makes `tokenizer.json` and `tokenizer_config.json`.

    Args:
      fields: the file's metadata.

    Returns:
      File's name -> content; nothing unless it is a byte-level BPE whose way of cutting text is known ("gpt-2",
      "smollm", "qwen2", "llama-bpe").

    Example:
      >>> tokenizer_files({"tokenizer.ggml.model": "llama"})
      {}
    """
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}.get
    tokens, merges = _texts(get("tokens")), _texts(get("merges"))
    types = get("token_type")
    cut = _CUTS.get(str(get("pre")))
    if get("model") != "gpt2" or cut is None or not tokens or not merges:
        return {}
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        return {}
    named = {
        name: tokens[number]
        for name, key in _NAMED.items()
        if isinstance(number := get(key), int) and 0 <= number < len(tokens)
    }
    added = [
        _added(number, tokens[number], special=bool(types[number] == _CONTROL))
        for number in np.flatnonzero(np.isin(types, (_CONTROL, _USER_DEFINED)))
    ]
    first, own = cut
    level = _byte_level(use_regex=own)
    steps = [] if first is None else [first]
    if first is not None and first["type"] == "Split":
        steps = [{**first, "behavior": "Isolated", "invert": False}]
    begins = get("add_bos_token") is True and "bos_token" in named
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if get("pre") == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]},
        "post_processor": _template(named["bos_token"], tokens) if begins else _byte_level(),
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": get("pre") == "llama-bpe",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    template = fields.get("tokenizer.chat_template")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **named,
        **({"chat_template": template} if isinstance(template, str) else {}),
    }
    return {"tokenizer.json": content, "tokenizer_config.json": config}


def _texts(value: Any) -> list[str]:
    """A list of text; nothing for anything else."""
    return value if isinstance(value, list) and all(isinstance(x, str) for x in value) else []


def _added(number: Any, token: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": int(number), "content": token, **flags, "special": special}


def _byte_level(*, use_regex: bool = True) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _template(begin: str, tokens: list[str]) -> dict[str, Any]:
    """Puts the first token before every text."""
    special = {"SpecialToken": {"id": begin, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {begin: {"id": begin, "ids": [tokens.index(begin)], "tokens": [begin]}},
    }
