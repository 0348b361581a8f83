"""Everything in a model's folder that is not weights: it goes with the model."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmerge.converters.gguf_reader import GgufCheckpoint
from jaxmerge.converters.gguf_tokenizer import tokenizer_files
from jaxmerge.converters.reader import Checkpoint

_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".tar", ".ckpt", ".gguf", ".h5", ".msgpack"),
    *(".onnx", ".partial", ".index.json"),
)
DTYPE_KEYS = ("dtype", "torch_dtype")
# What tools keep in a folder for themselves.
_PRIVATE = frozenset({".git", ".cache", "__pycache__"})


def is_weights(name: str) -> bool:
    """Whether a file is weights, or an index of them, by its name.

    Example:
      >>> is_weights("model.safetensors.index.json"), is_weights("tokenizer.json")
      (True, False)
    """
    return name.endswith(_WEIGHTS)


def side_files(folder: Path, *, apart: Path | None = None) -> Iterator[Path]:
    """Yields the files of a model's folder that are not weights, nested ones too, by their names within it.

    Links to files are followed, as the files of a hub's cache are links; links to folders are not.

    Args:
      folder: of a model; a file has none.
      apart: a folder within it whose files are none of the model's: what is being written.
    """
    left_out = None if apart is None else apart.resolve()
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if name not in _PRIVATE and (Path(place) / name).resolve() != left_out
        )
        for name in sorted(files):
            inside = (Path(place) / name).relative_to(folder)
            if not is_weights(name) and (folder / inside).is_file():
                yield inside


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a config.json in which every entry that names a dtype of weights is set, nested configs too.

    Args:
      config: the parsed config.
      dtype: its name, as "bfloat16".

    Example:
      >>> with_dtype({"torch_dtype": "float32", "text_config": {"dtype": "float32"}}, "bfloat16")
      {'torch_dtype': 'bfloat16', 'text_config': {'dtype': 'bfloat16'}}
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in DTYPE_KEYS and isinstance(value, str):
            changed[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config"):
            changed[key] = with_dtype(value, dtype)
        else:
            changed[key] = value
    return changed


def write_described_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the `config.json` and the tokenizer that a checkpoint's own metadata stand for (GGUF).

    Does nothing for other formats, or where the folder has a `config.json`; keeps a tokenizer that is there.

    Args:
      checkpoint: open.
      folder: where the model goes.
    """
    if checkpoint.config is None or (folder / "config.json").exists():
        return
    sizes: collections.Counter[str] = collections.Counter()
    for info in checkpoint.tensors.values():
        sizes[info.dtype] += info.nbytes
    dtype = sizes.most_common(1)[0][0] if sizes else "float32"
    write_json(folder / "config.json", {**checkpoint.config, "torch_dtype": dtype})
    if isinstance(checkpoint, GgufCheckpoint) and not any(folder.glob("tokenizer*")):
        for name, content in tokenizer_files(checkpoint.fields).items():
            write_json(folder / name, content)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a configuration as tools of the field do."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
