"""The tokenizer of a GGUF file: cut as its kind says, with its special tokens; what is not known is left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmerge.converters.gguf_tokenizer import tokenizer_files

TOKENS = ["<s>", "</s>", "<tool>", "a", "b", "1", "2", "Ġ", "'", "s", "A", "ab", "12", "Ġab", "'s"]
MERGES = ["a b", "1 2", "Ġ ab", "' s"]
FIELDS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.token_type": np.array([3, 3, 4] + [1] * (len(TOKENS) - 3), np.int32),
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "{{ messages }}",
}


def loaded(tmp_path: Path, **changes: Any) -> Any:
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    fields = FIELDS | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(tokenizer_files(fields)["tokenizer.json"]))
    return tokenizers.Tokenizer.from_file(str(file))


@pytest.mark.parametrize(
    ("kind", "digits"),
    [("gpt-2", ["12"]), ("llama-bpe", ["12"]), ("smollm", ["1", "2"]), ("qwen2", ["1", "2"])],
)
def test_text_is_cut_as_its_kind_says(tmp_path: Path, kind: str, digits: list[str]) -> None:
    tokenizer = loaded(tmp_path, pre=kind)
    text = "ab ab's12ab"
    found = tokenizer.encode(text)
    assert found.tokens == ["ab", "Ġab", "'s", *digits, "ab"]
    assert tokenizer.decode(found.ids) == text


@pytest.mark.parametrize(("kind", "whole"), [("gpt-2", False), ("llama-bpe", True)])
def test_contractions_of_capitals_are_one_kind_s_alone(
    tmp_path: Path, kind: str, whole: bool
) -> None:
    tokens = [*TOKENS, "S", "'S"]
    types = np.array([3, 3, 4] + [1] * (len(tokens) - 3), np.int32)
    tokenizer = loaded(tmp_path, pre=kind, tokens=tokens, token_type=types, merges=[*MERGES, "' S"])
    assert tokenizer.encode("ab'S").tokens == ["ab", *(["'S"] if whole else ["'", "S"])]


def test_special_tokens_are_whole_and_named(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path)
    assert tokenizer.encode("a<s>b<tool>").tokens == ["a", "<s>", "b", "<tool>"]
    assert tokenizer.decode([3, 0, 2]) == "a<tool>"
    config = tokenizer_files(FIELDS)["tokenizer_config.json"]
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    assert config["chat_template"] == "{{ messages }}"


def test_the_first_token_is_put_before_every_text_if_asked(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, add_bos_token=True)
    assert tokenizer.encode("ab").tokens == ["<s>", "ab"]
    assert tokenizer.encode("ab", "a").tokens == ["<s>", "ab", "<s>", "a"]
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["ab"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "llama"},
        {"pre": "some-other"},
        {"tokens": None},
        {"merges": np.zeros(3)},
        {"token_type": np.zeros(3, np.int32)},
        {"tokens": [1, 2, 3]},
    ],
)
def test_what_is_not_known_is_left_out(changes: dict[str, Any]) -> None:
    fields = FIELDS | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    assert tokenizer_files(fields) == {}
