"""The tokenizer's files in the output's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxmerge.recipes.tokenizers.tokenizer import (
    CONFIG,
    DOCUMENT,
    FILES,
    TEMPLATE,
    Tokenizer,
    read_json,
)


@dataclass(frozen=True, eq=False)
class TokenizerFiles:
    """What becomes of the output's tokenizer files.

    Attributes:
        written: name -> text.
        copied: name -> the file that is copied as it is.
    """

    written: Mapping[str, str]
    copied: Mapping[str, Path]


def tokenizer_files(
    folder: str, tokenizer: Tokenizer | None = None, template: str | None = None
) -> TokenizerFiles:
    """Says which files transformers loads the output's tokenizer from.

    Args:
        folder: whose files they are at first.
        tokenizer: its tokens, where they differ from those of the files.
        template: a chat template in the place of the folder's.
    """
    written: dict[str, str] = {}
    config = dict(read_json(folder, CONFIG) or {})
    kept = dict(config)
    if tokenizer is not None:
        entries = tokenizer.table.entries()
        if tokenizer.document is not None:
            written[DOCUMENT] = _json({**tokenizer.document, "added_tokens": entries}, indent=None)
        if tokenizer.document is None or "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = {
                str(place): asdict(token) for place, token in sorted(tokenizer.table.added.items())
            }
        if os.path.isfile(os.path.join(folder, "added_tokens.json")):
            beyond = [e for e in entries if e["content"] not in tokenizer.table.own]
            written["added_tokens.json"] = _json({e["content"]: e["id"] for e in beyond})
    if template is not None:
        written[TEMPLATE] = template
        if "chat_template" in config:
            config["chat_template"] = template
    if config != kept:
        written[CONFIG] = _json(config)
    paths = [Path(folder, name) for name in FILES if name not in written]
    if template is not None:
        paths = [path for path in paths if path.name != "chat_template.json"]
    return TokenizerFiles(written, {path.name: path for path in paths if path.is_file()})


def _json(data: Any, indent: int | None = 2) -> str:
    # Python's encoder is fast without indents only.
    separators = (",", ":") if indent is None else None
    return json.dumps(data, ensure_ascii=False, indent=indent, separators=separators) + "\n"
